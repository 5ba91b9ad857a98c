"""What `solvers.py` measured, as text that can be read as it is and is Markdown too."""

import numpy as np

ACCURACIES = ("equality", "smallest", "excess", "difference", "stationarity", "gap")


def show(value) -> str:
    "A number to three digits; nothing for what does not apply."
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def power(value) -> str:
    "A number to its power of ten."
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    "A table with its columns aligned."
    widths = [max(len(row[j]) for row in [head, *rows]) for j in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def methods(results: dict[str, dict]) -> str:
    "One size by all who solved it."
    ours = results["structured"].get("seconds")
    rows = [[name, show(r.get("seconds")), show(r["seconds"] / ours if ours and "seconds" in r else None),
             *(show(r.get(key)) for key in ("before", "peak", "iterations")), r.get("failed") or r["status"],
             *(power(r.get(key)) for key in ACCURACIES)] for name, r in results.items()]
    return markdown(["", "seconds", "times ours", "MB before", "MB at most", "iterations", "status", *ACCURACIES], rows)


def path(r: dict) -> list[str]:
    "One range of lam: in a sentence, and value by value."
    if "failed" in r:
        return [r["failed"]]
    values, total, cold = len(r["lam"]), r["total"], sum(r["cold"])
    rows = [[*(show(v) for v in (lam, c, w, c / w)), str(cold_steps), str(warm_steps)] for lam, c, w, cold_steps, warm_steps in
            zip(r["lam"], r["cold"], r["warm"], r["cold steps"], r["warm steps"])]
    return [f"{values} values from {r['lam'][0]:g} to {r['lam'][-1]:g}: {total:.2f} s with `qp.path`, {cold:.2f} s one by one, ratio {cold / total:.1f}. "
            f"One cold solution at lam = 1 takes {r['one']:.2f} s, {r['one'] * values / total:.1f} times a value on the path. "
            f"Largest difference of a weight: {r['apart']:.0e} of the mean weight.",
            markdown(["lam", "cold, s", "on the path, s", "ratio", "steps cold", "steps on the path"], rows)]


def growth(results: dict[str, dict]) -> list[str]:
    "Exponents fitted to the measurements, and these."
    rows, fits = [], []
    for name, r in results.items():
        if "failed" in r:
            fits.append(f"{name}: {r['failed']}")
            continue
        rows += [[name, *(show(row[key]) for key in ("n", "K", "d", "seconds")), str(row["steps"])] for row in r["rows"]]
        size, seconds, steps = (np.array([row[key] for row in r["rows"]], float) for key in (name, "seconds", "steps"))
        whole, step = (np.polyfit(np.log(size), np.log(y), 1)[0] for y in (seconds, seconds / steps))
        fits.append(f"{name}: {whole:.2f} (of one step: {step:.2f})")
    return ["Seconds grow like a power of the number of controls n, of clusters K, and of covariates d, while the other two stay fixed. "
            "Fitted exponents: " + "; ".join(fits) + ".", markdown(["growing", "n", "K", "d", "seconds", "steps"], rows)]


def targets(results: dict[str, dict], paths: dict[str, list[dict]]) -> str:
    "Beside each target what was measured, for the sizes that were run."
    ours = {size: found["structured"] for size, found in results.items() if "failed" not in found["structured"]}
    rows = [_accuracy(results, ours)] if results else []
    for size, method, goal, words in (("S", "PIQP", 1, "no slower than PIQP, best formulation"), ("S", "OSQP", 3, "3 times faster than OSQP at its defaults"),
                                      ("M", "OSQP", 15, "15 times faster than OSQP at its defaults, best scaled"),
                                      ("M", "PIQP", 1.5, "1.5 times faster than PIQP, best formulation"),
                                      ("COS", "OSQP", 10, "10 times faster than OSQP at its defaults")):
        if size in ours and method in results[size]:
            rows.append(_faster(f"{size}: {words}", ours[size]["seconds"], results[size][method], goal))
    for size, most in (("XL", 8), ("Mundlak", 10)):
        if size in ours:
            rows.append([f"{size}: at most {most} s", f"{ours[size]['seconds']:.1f} s", ours[size]["seconds"] <= most])
    if "XL" in ours:
        rows.append(["XL: at most 1,000 MB in all", f"{ours['XL']['peak']:,.0f} MB ({ours['XL']['before']:.0f} before)", ours["XL"]["peak"] <= 1000])
    for r in (r for several in paths.values() for r in several if "failed" not in r):
        ratio = sum(r["cold"]) / r["total"]
        rows.append([f"path, lam {r['lam'][0]:g} to {r['lam'][-1]:g}: a value 8 times cheaper than cold", f"{ratio:.1f} times", ratio >= 8])
    words = {True: "yes", False: "NO", None: "not measured"}
    return markdown(["target", "measured", "met"], [[*row, words[met]] for *row, met in rows]) if rows else ""


def _accuracy(results: dict[str, dict], ours: dict[str, dict]) -> list:
    good = [r["equality"] <= 1e-10 and r["smallest"] >= 0 and abs(r["gap"]) <= 1e-8 for r in ours.values()]
    worst = [power(max((abs(r[key]) for r in ours.values()), default=None)) for key in ("equality", "gap")]
    return ["every size: equality to 1e-10, no weight below 0, gap to 1e-8",
            f"{sum(good)} of {len(results)} sizes; at worst equality {worst[0]}, gap {worst[1]}", sum(good) == len(results)]


def _faster(words: str, ours: float, other: dict, goal: float) -> list:
    "How many times longer the other took; if it was stopped, at least so many times."
    seconds = other.get("seconds", other.get("stopped"))
    if seconds is None:
        return [words, other["failed"], None]
    more = "more than " if "stopped" in other else ""
    return [words, f"{more}{seconds / ours:.1f} times ({show(ours)} s, {show(seconds)} s)", seconds >= goal * ours]
