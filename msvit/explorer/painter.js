// The picture under its mixed-scale grid, to paint on with a pointer or the keyboard. The browser draws at once and
// Python follows: a region is painted (1 coarse, 0 fine) or free (-1), and then what the gate decided counts.
const ORANGE = "230,159,0", BLUE = "86,180,233", WIDTH = 448;
const HELP = "Drag to paint; Ctrl+Z undoes. Orange hatch: one coarse token; blue: fine ones.";
const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function render({ model, el }) {
  const canvas = document.createElement("canvas"), readout = document.createElement("div"), picture = new Image();
  canvas.className = "msvit-canvas";
  canvas.style.cssText = "width:100%; display:block; cursor:crosshair; touch-action:none";
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-roledescription", "grid of regions");
  canvas.dataset.lmSuppressShortcuts = "true";  // JupyterLab would take the arrow keys
  readout.className = "msvit-readout";
  readout.setAttribute("role", "status");
  readout.style.cssText = "font: 12px/18px var(--jp-ui-font-family, sans-serif); min-height: 36px; padding-top: 4px";
  el.append(canvas, readout);
  let at = -1, from = -1, drawing = false, url = "";  // the region pointed at, and where a rectangle began
  let within = null;  // where in that region, [0, 1) down and across
  const get = (name) => model.get(name);
  const wanted = (i) => Math.min(get("painted")[i] < 0 ? get("coarse")[i] : get("painted")[i], get("sizes"));

  // The regions of the token of a size that would cover region i; none where such a token ends outside of the picture.
  function block(i, size) {
    const [h, w] = get("grid"), n = 2 ** Math.max(size - 1, 0), r = Math.floor(i / w / n) * n, c = Math.floor((i % w) / n) * n;
    if (r + n > h || c + n > w) return [];
    return Array.from({ length: n * n }, (_, f) => (r + Math.floor(f / n)) * w + c + (f % n));
  }

  // The size of token over region i, 0 fine, 1 coarse, 2 twice as wide …: it has all of its regions to itself.
  function level(i) {
    let size = wanted(i);
    const whole = (cells) => cells.length && cells.every((j) => wanted(j) >= size);
    while (size > 1 && !whole(block(i, size))) size--;
    return size;
  }

  function frame(g, x, y, w, h, colour) {
    for (const [inset, style, line] of [[0.5, "rgba(0,0,0,.5)", 1], [2, `rgb(${colour})`, 2]]) {
      g.strokeStyle = style; g.lineWidth = line;
      g.strokeRect(x + inset, y + inset, w - 2 * inset, h - 2 * inset);
    }
  }

  function region(g, i, x, y, sx, sy) {
    const k = get("scale");
    const size = level(i), n = 2 ** Math.max(size - 1, 0);
    if (size > 0 && block(i, size)[0] === i) {  // drawn once, from the first of its regions
      g.strokeStyle = `rgba(${ORANGE},.45)`; g.lineWidth = 2; g.beginPath();
      for (let t = 0.25; t < 2; t += 0.25) {
        const a = Math.max(0, t - 1), b = Math.min(1, t);
        g.moveTo(x + a * n * sx, y + (t - a) * n * sy); g.lineTo(x + b * n * sx, y + (t - b) * n * sy);
      }
      g.stroke(); frame(g, x, y, n * sx, n * sy, ORANGE);
    } else if (!size) for (let f = 0; f < k * k; f++)
      frame(g, x + ((f % k) * sx) / k, y + (Math.floor(f / k) * sy) / k, sx / k, sy / k, BLUE);
    if (get("painted")[i] >= 0) {
      g.fillStyle = "white"; g.strokeStyle = "black"; g.lineWidth = 2; g.beginPath();
      g.arc(x + sx / 7, y + sy / 7, Math.min(7, sx / 9), 0, 7); g.fill(); g.stroke();
    }
  }

  function draw() {
    const g = canvas.getContext("2d"), [h, w] = get("grid");
    canvas.width = WIDTH; canvas.height = picture.naturalWidth ? (WIDTH * picture.naturalHeight) / picture.naturalWidth : WIDTH;
    canvas.setAttribute("aria-label", `The picture's regions, ${h} rows by ${w} columns. Arrow keys move, space paints, ` +
      "Ctrl+Z undoes, Ctrl+Shift+Z redoes.");
    canvas.dataset.tool = get("tool");
    canvas.style.cursor = get("tool") === "pick" ? "pointer" : "crosshair";
    g.imageSmoothingEnabled = false;
    if (picture.complete && picture.naturalWidth) g.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const sx = canvas.width / w, sy = canvas.height / h;
    for (let i = 0; i < h * w; i++) region(g, i, (i % w) * sx, Math.floor(i / w) * sy, sx, sy);
    const marked = at < 0 ? [] : cells();
    if (marked.length) {
      const rows = marked.map((i) => Math.floor(i / w)), columns = marked.map((i) => i % w);
      const top = Math.min(...rows), left = Math.min(...columns);
      g.strokeStyle = "white"; g.lineWidth = 4;
      g.strokeRect(left * sx + 5, top * sy + 5, (Math.max(...columns) - left + 1) * sx - 10, (Math.max(...rows) - top + 1) * sy - 10);
    }
    const score = get("scores")[at];  // a rule has none
    const text = at < 0 ? HELP
      : `row ${Math.floor(at / w)}, column ${at % w}: ` + (score === undefined ? "" : `score ${score.toFixed(2)}, `) +
        `m ${get("soft")[at].toFixed(3)}, ${["fine", "coarse"][level(at)] ?? `one token for ${4 ** (level(at) - 1)} regions`}` + (get("painted")[at] >= 0 ? ", painted" : "");
    if (readout.textContent !== text) readout.textContent = text;
  }

  // The regions that the brush or the rectangle covers now.
  function cells() {
    const [h, w] = get("grid"), r = Math.floor(at / w), c = at % w, n = get("width"), half = Math.floor((n - 1) / 2);
    let [top, left, bottom, right] = [r - half, c - half, r - half + n - 1, c - half + n - 1];
    if (get("tool") === "rectangle") {
      const [r0, c0] = from < 0 ? [r, c] : [Math.floor(from / w), from % w];
      [top, left, bottom, right] = [Math.min(r, r0), Math.min(c, c0), Math.max(r, r0), Math.max(c, c0)];
    }
    const found = [];
    for (let y = Math.max(0, top); y <= Math.min(h - 1, bottom); y++)
      for (let x = Math.max(0, left); x <= Math.min(w - 1, right); x++) found.push(y * w + x);
    return found;
  }

  function paint() {
    const brush = get("brush"), painted = [...get("painted")];  // a new list: changes in place do not travel
    const size = Math.min(brush, get("sizes")), whole = (i) => (size > 1 && block(i, size).length ? block(i, size) : [i]);
    const changed = at < 0 ? [] : [...new Set(cells().flatMap(whole))].filter((i) => painted[i] !== brush);
    if (!changed.length) return;
    for (const i of changed) painted[i] = brush;
    model.set("painted", painted);
    model.save_changes();
  }

  function pick() {  // the token of the fine patch pointed at
    const w = get("grid")[1], k = get("scale");
    if (at < 0) return;
    const [r, c] = within ?? [0, 0];
    model.set("picked", (Math.floor(at / w) * k + Math.floor(r * k)) * w * k + (at % w) * k + Math.floor(c * k));
    model.save_changes();
    draw();
  }

  function begin() {  // a stroke
    if (get("tool") === "pick") return pick();
    model.set("stroke", get("stroke") + 1);
    drawing = true;
    if (get("tool") === "rectangle") from = at; else paint();
  }

  function end() {
    if (drawing && get("tool") === "rectangle") paint();
    drawing = false; from = -1;
    draw();
  }

  function pointed(event) {
    const box = canvas.getBoundingClientRect(), [h, w] = get("grid");
    const x = ((event.clientX - box.left) / box.width) * w, y = ((event.clientY - box.top) / box.height) * h;
    const c = Math.floor(x), r = Math.floor(y);
    within = [y - r, x - c];
    if (r >= 0 && r < h && c >= 0 && c < w) return r * w + c;
    return drawing ? at : -1;
  }

  canvas.onpointerdown = (e) => { if (e.button) return; canvas.setPointerCapture(e.pointerId); at = pointed(e); begin(); };
  canvas.onpointerup = end;
  canvas.onpointercancel = () => { drawing = false; from = -1; draw(); };
  canvas.onpointermove = (e) => {
    const passed = drawing ? e.getCoalescedEvents?.() ?? [] : [];
    for (const step of passed.length ? passed : [e]) {
      at = pointed(step);
      if (drawing && get("tool") === "stroke") paint();
    }
    draw();
  };
  canvas.onpointerleave = () => { if (!drawing) { at = -1; draw(); } };
  canvas.onfocus = () => { if (at < 0) at = 0; draw(); };
  canvas.onblur = () => { at = from = -1; drawing = false; draw(); };
  canvas.onkeydown = (e) => {
    const [h, w] = get("grid"), control = e.ctrlKey || e.metaKey, key = e.key.toLowerCase();
    if (control && (key === "z" || key === "y")) model.send({ do: key === "y" || e.shiftKey ? "redo" : "undo" });
    else if (control || e.altKey) return;
    else if (MOVES[e.key]) {
      const [down, across] = MOVES[e.key], i = Math.max(at, 0);
      within = null;
      at = Math.min(Math.max(Math.floor(i / w) + down, 0), h - 1) * w + Math.min(Math.max((i % w) + across, 0), w - 1);
    } else if (e.key === " ") {
      if (get("tool") !== "rectangle") { begin(); end(); }
      else if (drawing) end();
      else begin();
    } else if (e.key === "Escape" && drawing) { drawing = false; from = -1; }
    else return;
    e.preventDefault(); e.stopPropagation();
    draw();
  };

  function load() {
    URL.revokeObjectURL(url);
    url = URL.createObjectURL(new Blob([get("picture")], { type: "image/png" }));
    picture.src = url;
  }
  picture.onload = draw;
  model.on("change:picture", load);
  for (const name of ["grid", "coarse", "painted", "soft", "tool", "width"]) model.on(`change:${name}`, draw);
  load();
  draw();
  return () => URL.revokeObjectURL(url);
}

export default { render };
