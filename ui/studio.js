() => {
  if (window.studioReady) return;
  window.studioReady = true;
  const on = (name, act) => document.addEventListener(name, act);
  document.documentElement.lang = "en";
  setTimeout(() => document.querySelector(".nav-holder nav a.active")?.scrollIntoView({ inline: "center", block: "nearest" }), 300);

  // -- a grid of pictures: arrow keys walk, Enter shows one large, Escape closes it --------------------------------
  const large = document.createElement("dialog");
  large.className = "large";
  large.setAttribute("aria-label", "Picture");
  large.addEventListener("click", () => large.close());
  document.body.append(large);
  let shown = null;
  const show = (cell) => {
    const picture = cell.querySelector("img");
    if (!picture) return;
    shown = cell;
    const image = document.createElement("img"), text = document.createElement("p"), close = document.createElement("button");
    image.src = picture.dataset.full || picture.src;
    image.alt = picture.alt;
    text.textContent = cell.title;
    close.textContent = "Close";
    close.className = "button close";
    large.replaceChildren(image, close, text);
    if (!large.open) large.showModal();
    close.focus();
  };
  const neighbour = (cell, key) => {
    const cells = (part) => (part ? [...part.querySelectorAll("[data-cell]")] : []);
    const row = cell.closest("tr");
    if (!row) {
      const all = cells(cell.closest(".works")), step = { ArrowLeft: -1, ArrowUp: -1 }[key] || 1;
      return all[all.indexOf(cell) + step];
    }
    const at = cells(row).indexOf(cell), rows = [...row.parentElement.querySelectorAll("tr")];
    if (key === "ArrowLeft") return cells(row)[at - 1];
    if (key === "ArrowRight") return cells(row)[at + 1];
    return cells(rows[rows.indexOf(row) + (key === "ArrowUp" ? -1 : 1)])[at];
  };
  on("keydown", (event) => {
    const cell = large.open ? shown : document.activeElement?.closest?.("[data-cell]");
    if (!cell || !event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const next = neighbour(cell, event.key);
    if (!next) return;
    if (large.open) show(next);
    else next.focus();
  });
  large.addEventListener("close", () => shown?.focus());
  on("click", (event) => {
    const cell = event.target.closest?.("[data-cell]");
    if (cell) show(cell);
  });

  // -- forms: sliders tell their number; Ctrl+Enter in a prompt presses its form's main button --------------------
  on("input", (event) => {
    const output = event.target.type === "range" && event.target.parentElement.querySelector("output");
    if (output) output.textContent = event.target.value;
  });
  on("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !event.target.matches?.("textarea.prompt")) return;
    event.target.dispatchEvent(new Event("change", { bubbles: true }));
    event.target.closest(".prose, .html-container")?.querySelector(".button.primary")?.click();
  });

  // -- what the server sends anew keeps the focus, and stays open where it was open --------------------------------
  const open = new Map();
  let focused = null;
  const named = (e) => e.id ? `#${CSS.escape(e.id)}` : ["edit", "click", "box"].filter((n) => e.dataset?.[n])
    .map((n) => `[data-${n}="${CSS.escape(e.dataset[n])}"]`)[0] || (e.matches?.("[data-cell]") ? `[data-cell][title="${CSS.escape(e.title)}"]` : "");
  document.addEventListener("toggle", (event) => {
    const key = event.target.dataset?.keep;
    if (key) open.set(key, event.target.open);
  }, true);
  on("focusin", (event) => { focused = { element: event.target, name: named(event.target) }; });
  new MutationObserver((changes) => {
    for (const change of changes) for (const node of change.addedNodes) {
      if (node.nodeType !== 1) continue;
      for (const part of [node, ...node.querySelectorAll("details[data-keep]")])
        if (part.dataset?.keep && open.has(part.dataset.keep)) part.open = open.get(part.dataset.keep);
    }
    if (focused?.name && !focused.element.isConnected && document.activeElement === document.body)
      document.querySelector(focused.name)?.focus({ preventScroll: true });
  }).observe(document.body, { childList: true, subtree: true });

  // -- regions: boxes drawn on a canvas, moved by pointer or arrow keys; Shift and arrows change the size ----------
  const MOST = 4, SMALLEST = 0.08;
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const boxes = (canvas) => [...canvas.querySelectorAll(".box")];
  const place = (box) => ["left", "top", "width", "height"].map((side) => parseFloat(box.style[side]) / 100);
  const put = (box, [x, y, w, h]) => {
    w = clamp(w, SMALLEST, 1); h = clamp(h, SMALLEST, 1);
    x = clamp(x, 0, 1 - w); y = clamp(y, 0, 1 - h);
    Object.assign(box.style, { left: `${100 * x}%`, top: `${100 * y}%`, width: `${100 * w}%`, height: `${100 * h}%` });
  };
  const tell = (canvas) => {
    const field = canvas.parentElement.querySelector("input[type=hidden]");
    const round = (value) => Math.round(value * 1000) / 1000;
    field.value = JSON.stringify(boxes(canvas).map((box) => {
      const [x, y, w, h] = place(box);
      return [round(x), round(y), round(x + w), round(y + h)];
    }));
    field.dispatchEvent(new Event("change", { bubbles: true }));
  };
  on("pointerdown", (event) => {
    const canvas = event.target.closest?.(".canvas");
    if (!canvas || event.button) return;
    const frame = canvas.getBoundingClientRect();
    const at = (e) => [clamp((e.clientX - frame.left) / frame.width, 0, 1), clamp((e.clientY - frame.top) / frame.height, 0, 1)];
    const [startX, startY] = at(event);
    let box = event.target.closest(".box"), act;
    if (!box) {
      if (boxes(canvas).length >= MOST) return;
      box = document.createElement("button");
      box.type = "button";
      box.className = "box";
      box.style.setProperty("--tone", `var(--curve-${boxes(canvas).length + 2})`);
      put(box, [startX, startY, SMALLEST, SMALLEST]);
      canvas.append(box);
      act = ([x, y]) => put(box, [Math.min(x, startX), Math.min(y, startY), Math.abs(x - startX), Math.abs(y - startY)]);
    } else {
      const [x0, y0, w0, h0] = place(box);
      act = event.target.matches("i")
        ? ([x, y]) => put(box, [x0, y0, Math.min(w0 + x - startX, 1 - x0), Math.min(h0 + y - startY, 1 - y0)])
        : ([x, y]) => put(box, [x0 + x - startX, y0 + y - startY, w0, h0]);
    }
    event.preventDefault();
    box.focus();
    const move = (e) => act(at(e));
    const end = () => {
      document.removeEventListener("pointermove", move);
      tell(canvas);
    };
    on("pointermove", move);
    document.addEventListener("pointerup", end, { once: true });
  });
  on("keydown", (event) => {
    const box = event.target.closest?.(".canvas .box");
    if (!box) return;
    const canvas = box.closest(".canvas"), [x, y, w, h] = place(box);
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Delete" || event.key === "Backspace") box.remove();
    else if (by) put(box, event.shiftKey ? [x, y, w + by[0] / 50, h + by[1] / 50] : [x + by[0] / 50, y + by[1] / 50, w, h]);
    else return;
    event.preventDefault();
    tell(canvas);
  });
}
