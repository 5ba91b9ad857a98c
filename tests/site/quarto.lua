-- What Quarto does with labels, references and callouts, as far as this book uses them.
-- What does not resolve is a warning, and a warning fails the build.

local words = {eq = "Equation", fig = "Figure", tbl = "Table"}
local count, number = {eq = 0, fig = 0, tbl = 0}, {}

local function warn(text)
  io.stderr:write("[WARNING] " .. text .. "\n")
end

local function kind(id)
  return id:match("^(%a+)%-")
end

-- The number of a new label.
local function label(id)
  if number[id] then
    warn("The label " .. id .. " is given twice")
  end
  count[kind(id)] = count[kind(id)] + 1
  number[id] = count[kind(id)]
  return number[id]
end

-- `$$ ... $$ {#eq-name}`: like Quarto, only with spaces between formula and label.
local function equations(block)
  local out, math = pandoc.Inlines {}, nil
  for _, el in ipairs(block.content) do
    local id = el.t == "Str" and el.text:match("^{#(eq%-[^}]+)}$")
    if math and id then
      while out[#out].t == "Space" do
        out:remove()
      end
      out[#out] = pandoc.Span({math, pandoc.Span("(" .. label(id) .. ")", {class = "number"})}, {id = id, class = "equation"})
      math = nil
    else
      if el.t == "Math" and el.mathtype == "DisplayMath" then
        math = el
      elseif el.t ~= "Space" then
        math = nil
      end
      out:insert(el)
    end
  end
  block.content = out
  return block
end

-- Puts "Figure 1: " before a caption, which is a list of blocks.
local function caption(blocks, id)
  local first = blocks[#blocks]
  local prefix = words[kind(id)] .. " " .. label(id)
  if first and first.content then
    first.content:insert(1, pandoc.Str(prefix .. ": "))
  else
    blocks:insert(pandoc.Plain(prefix))
  end
end

local function captioned(el)
  local k = kind(el.identifier)
  if k == "fig" or k == "tbl" then
    caption(el.t == "Div" and el.content or el.caption.long, el.identifier)
    return el
  end
end

-- `: Caption {#tbl-name}` below a table
local function tables(el)
  local last = el.caption.long[#el.caption.long]
  if last and el.identifier == "" then
    local id = last.content[#last.content].t == "Str" and last.content[#last.content].text:match("^{#(tbl%-[^}]+)}$")
    if id then
      last.content:remove()
      el.identifier = id
    end
  end
  return captioned(el)
end

local function callout(el)
  for _, class in ipairs(el.classes) do
    local name = class:match("^callout%-(%a+)$")
    if name then
      local title = pandoc.Inlines(el.attributes.title or name:sub(1, 1):upper() .. name:sub(2))
      if el.content[1] and el.content[1].t == "Header" then
        title = el.content[1].content
        el.content:remove(1)
      end
      el.content:insert(1, pandoc.Para(pandoc.Strong(title)))
      el.attributes.title = nil
      el.classes:insert("callout")
      return el
    end
  end
end

local function references(cite)
  local out, found = pandoc.Inlines {}, false
  for i, c in ipairs(cite.citations) do
    local k = kind(c.id)
    if k == "sec" then
      warn("@" .. c.id .. ": sections have no numbers here, write [text](#" .. c.id .. ")")
    elseif words[k] then
      found = true
      if i > 1 then
        out:insert(pandoc.Str ", ")
      end
      local text = tostring(number[c.id] or "?")
      if c.mode ~= "SuppressAuthor" then
        text = words[k] .. "\u{a0}" .. text
      end
      if number[c.id] then
        out:insert(pandoc.Link(text, "#" .. c.id))
      else
        warn("@" .. c.id .. " does not resolve: nothing on this page has that label")
      end
    end
  end
  return found and out or nil
end

return {
  {traverse = "topdown", Para = equations, Plain = equations, Figure = captioned, Table = tables, Div = captioned},
  {Cite = references, Div = callout},
}
