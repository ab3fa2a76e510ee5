// Tables sort by a click on a column's name; a second click turns the order round. Empty cells stay last.
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0]
  const heads = [...table.tHead.rows[0].cells]
  heads.forEach((head, column) => {
    head.querySelector('button').addEventListener('click', () => {
      const falling = head.getAttribute('aria-sort') === 'ascending'
      for (const other of heads) other.removeAttribute('aria-sort')
      head.setAttribute('aria-sort', falling ? 'descending' : 'ascending')
      const numeric = head.classList.contains('number')
      const keyed = [...body.rows].map((row) => [row.cells[column].textContent.trim(), row])
      keyed.sort(([a], [b]) => {
        if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1)
        const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true })
        return falling ? -order : order
      })
      body.append(...keyed.map(([, row]) => row))
    })
  })
}
