// Without this script the page is whole; with it, tables sort by a click on a head, and filter.
const missing = /^(–|none|)$/
const numeric = /^(lost |gained |lower |higher |<)?[-+−]?[\d.]/
const valueOf = text => {
  const [, digits, unit] = text.replace(/−/g, "-").replace(/,/g, "").match(/([-+]?[\d.]+(?:e[-+]?\d+)?)\s*([kMG])?/)
  return Number(digits) * ({k: 1e3, M: 1e6, G: 1e9}[unit] ?? 1)
}
const textOf = (row, i) => row.cells[i].textContent.trim()

const sort = (table, head, i) => {
  const up = head.ariaSort !== "ascending"
  const rows = [...table.tBodies[0].rows]
  const known = rows.filter(row => !missing.test(textOf(row, i)))
  const numbers = known.every(row => numeric.test(textOf(row, i)))
  const compare = (a, b) => numbers
    ? valueOf(textOf(a, i)) - valueOf(textOf(b, i))
    : textOf(a, i).localeCompare(textOf(b, i), undefined, {numeric: true})
  known.sort((a, b) => up ? compare(a, b) : compare(b, a))
  table.tBodies[0].append(...known, ...rows.filter(row => !known.includes(row)))
  for (const other of table.tHead.rows[0].cells) other.ariaSort = null
  head.ariaSort = up ? "ascending" : "descending"
}

for (const table of document.querySelectorAll("table")) {
  const rows = [...table.tBodies[0].rows]
  if (table.classList.contains("sortable") && rows.length > 1)
    [...table.tHead.rows[0].cells].forEach((head, i) => {
      const button = document.createElement("button")
      button.append(...head.childNodes)
      button.onclick = () => sort(table, head, i)
      head.append(button)
    })
  if (rows.length > 7) {
    const field = document.createElement("input")
    Object.assign(field, {type: "search", placeholder: "filter rows", className: "filter"})
    field.ariaLabel = `filter rows: ${table.caption?.textContent ?? "table"}`
    field.oninput = () => rows.forEach(row =>
      row.hidden = !row.textContent.toLowerCase().includes(field.value.toLowerCase()))
    table.parentElement.before(field)
  }
}
