// The picture under its mixed-scale grid. Click or drag paints regions; hovering shows a region's score. The browser draws
// at once and Python follows: a region is painted (1 coarse, 0 fine) or free (-1), and then what the gate decided counts.
const ORANGE = "230,159,0", BLUE = "86,180,233";

function render({ model, el }) {
  const canvas = document.createElement("canvas"), readout = document.createElement("div"), picture = new Image();
  canvas.className = "msvit-canvas";
  canvas.style.cssText = "width:100%; display:block; cursor:crosshair; touch-action:none";
  readout.className = "msvit-readout";
  readout.style.cssText = "font: 12px/18px var(--jp-ui-font-family, sans-serif); min-height: 36px; padding-top: 4px";
  el.append(canvas, readout);
  let hovered = -1, drawing = false, url = "";
  const grid = () => model.get("grid");
  const coarse = (i) => (model.get("painted")[i] < 0 ? model.get("coarse")[i] : model.get("painted")[i]) === 1;

  function frame(g, x, y, w, h, colour) {
    for (const [inset, style, line] of [[0.5, "rgba(0,0,0,.5)", 1], [2, `rgb(${colour})`, 2]]) {
      g.strokeStyle = style; g.lineWidth = line;
      g.strokeRect(x + inset, y + inset, w - 2 * inset, h - 2 * inset);
    }
  }

  function draw() {
    const g = canvas.getContext("2d"), [h, w] = grid(), k = model.get("scale");
    canvas.width = 448; canvas.height = picture.naturalWidth ? (448 * picture.naturalHeight) / picture.naturalWidth : 448;
    g.imageSmoothingEnabled = false;
    if (picture.complete && picture.naturalWidth) g.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const sx = canvas.width / w, sy = canvas.height / h;
    for (let i = 0; i < h * w; i++) {
      const x = (i % w) * sx, y = Math.floor(i / w) * sy;
      if (coarse(i)) {
        g.strokeStyle = `rgba(${ORANGE},.45)`; g.lineWidth = 2; g.beginPath();
        for (let t = 0.25; t < 2; t += 0.25) {
          const a = Math.max(0, t - 1), b = Math.min(1, t);
          g.moveTo(x + a * sx, y + (t - a) * sy); g.lineTo(x + b * sx, y + (t - b) * sy);
        }
        g.stroke(); frame(g, x, y, sx, sy, ORANGE);
      } else for (let f = 0; f < k * k; f++)
        frame(g, x + ((f % k) * sx) / k, y + (Math.floor(f / k) * sy) / k, sx / k, sy / k, BLUE);
      if (model.get("painted")[i] >= 0) {
        g.fillStyle = "white"; g.strokeStyle = "black"; g.lineWidth = 2; g.beginPath();
        g.arc(x + 15, y + 15, 7, 0, 7); g.fill(); g.stroke();
      }
      if (i === hovered) { g.strokeStyle = "white"; g.lineWidth = 4; g.strokeRect(x + 5, y + 5, sx - 10, sy - 10); }
    }
    const score = model.get("scores")[hovered];  // a rule has none
    readout.textContent = hovered < 0 ? "Click or drag to paint. Orange hatch: one coarse token; blue: fine ones."
      : `row ${Math.floor(hovered / w)}, column ${hovered % w}: ` + (score === undefined ? "" : `score ${score.toFixed(2)}, `) +
        `m ${model.get("soft")[hovered].toFixed(3)}, ${coarse(hovered) ? "coarse" : "fine"}` +
        (model.get("painted")[hovered] >= 0 ? ", painted" : "");
  }

  function region(event) {
    const box = canvas.getBoundingClientRect(), [h, w] = grid();
    const c = Math.floor(((event.clientX - box.left) / box.width) * w);
    const r = Math.floor(((event.clientY - box.top) / box.height) * h);
    return r >= 0 && r < h && c >= 0 && c < w ? r * w + c : -1;
  }

  function paint(i) {
    if (i < 0 || model.get("painted")[i] === model.get("brush")) return;
    const painted = [...model.get("painted")];  // a new list: changes in place do not travel
    painted[i] = model.get("brush");
    model.set("painted", painted);
    model.save_changes();
  }

  canvas.onpointerdown = (e) => { drawing = true; canvas.setPointerCapture(e.pointerId); paint(region(e)); };
  canvas.onpointerup = canvas.onpointercancel = () => { drawing = false; };
  canvas.onpointermove = (e) => {
    const passed = e.getCoalescedEvents?.() ?? [];
    if (drawing) for (const step of passed.length ? passed : [e]) paint(region(step));
    hovered = region(e);
    draw();
  };
  canvas.onpointerleave = () => { hovered = -1; draw(); };

  function load() {
    URL.revokeObjectURL(url);
    url = URL.createObjectURL(new Blob([model.get("picture")], { type: "image/png" }));
    picture.src = url;
  }
  picture.onload = draw;
  model.on("change:picture", load);
  for (const name of ["grid", "coarse", "painted", "soft"]) model.on(`change:${name}`, draw);
  load();
  draw();
  return () => URL.revokeObjectURL(url);
}

export default { render };
