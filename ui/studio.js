() => {
  // Arrow keys walk a grid of pictures; Enter shows one large; Escape closes it.
  if (window.studioReady) return;
  window.studioReady = true;
  const large = document.createElement("dialog");
  large.className = "large";
  large.setAttribute("aria-label", "Picture");
  large.addEventListener("click", () => large.close());
  document.body.append(large);
  const show = (cell) => {
    const picture = cell.querySelector("img");
    if (!picture) return;
    const image = document.createElement("img");
    image.src = picture.dataset.full || picture.src;
    image.alt = picture.alt;
    const text = document.createElement("p");
    text.textContent = cell.title;
    large.replaceChildren(image, text);
    if (!large.open) large.showModal();
  };
  const neighbour = (cell, key) => {
    const row = cell.closest("tr"), at = [...row.querySelectorAll("[data-cell]")].indexOf(cell);
    const rows = [...row.parentElement.querySelectorAll("tr")], y = rows.indexOf(row);
    const cells = (r) => (r ? [...r.querySelectorAll("[data-cell]")] : []);
    if (key === "ArrowLeft") return cells(row)[at - 1];
    if (key === "ArrowRight") return cells(row)[at + 1];
    return cells(rows[y + (key === "ArrowUp" ? -1 : 1)])[at];
  };
  document.addEventListener("keydown", (event) => {
    const cell = document.activeElement?.closest?.("[data-cell]") || (large.open && window.studioCell);
    if (!cell) return;
    if (event.key.startsWith("Arrow")) {
      const next = neighbour(cell, event.key);
      if (next) {
        event.preventDefault();
        next.focus();
        window.studioCell = next;
        if (large.open) show(next);
      }
    } else if (event.key === "Enter" && !large.open) {
      window.studioCell = cell;
      show(cell);
    }
  });
  document.addEventListener("click", (event) => {
    const cell = event.target.closest?.("[data-cell]");
    if (cell) { window.studioCell = cell; show(cell); }
  });
}
