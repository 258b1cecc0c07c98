// A long list of thumbnails. Only the rows in sight are in the page, and sheets of thumbnails come when they are needed.
const SORTS = { "largest loss": (m, i) => -m.get("loss")[i], "smallest loss": (m, i) => (m.get("loss")[i] < 0 ? 1e9 : m.get("loss")[i]),
  "most tokens": (m, i) => -m.get("tokens")[i], "fewest tokens": (m, i) => m.get("tokens")[i], "as they come": (m, i) => i };
const right = (m, i, by) => m.get(by)[i] === m.get("truth")[i], known = (m, i) => m.get("truth")[i] >= 0;
const FILTERS = { "all pictures": () => true,
  "wrong": (m, i) => known(m, i) && !right(m, i, "predicted"), "right": (m, i) => known(m, i) && right(m, i, "predicted"),
  "dense is right, this is not": (m, i) => known(m, i) && right(m, i, "dense") && !right(m, i, "predicted"),
  "differs from dense": (m, i) => m.get("dense")[i] !== m.get("predicted")[i] };
const CELL = 84, GAP = 30;  // of a thumbnail, and below it for its words

function render({ model, el }) {
  const bar = document.createElement("div"), count = document.createElement("span"), list = document.createElement("div");
  const inner = document.createElement("div"), sheets = new Map();
  const choose = (label, options) => {
    const box = document.createElement("label"), select = document.createElement("select");
    for (const option of options) select.add(new Option(option, option));
    box.append(`${label} `, select, "  ");
    select.onchange = () => { list.scrollTop = 0; order(); };
    bar.append(box);
    return select;
  };
  const sort = choose("Sort by", Object.keys(SORTS)), filter = choose("show", Object.keys(FILTERS));
  const of = choose("of class", ["any"]);
  bar.append(count);
  bar.style.cssText = "font: 13px/28px var(--jp-ui-font-family, sans-serif); white-space: pre-wrap";
  list.className = "msvit-gallery";
  list.style.cssText = "height: 380px; overflow-y: auto; position: relative; border-top: 1px solid #bbb";
  inner.style.cssText = "position: relative; width: 100%";
  list.append(inner);
  el.append(bar, list);
  let shown = [];

  function reset() {
    for (const url of sheets.values()) if (url) URL.revokeObjectURL(url);
    sheets.clear();
    of.replaceChildren(new Option("any", "any"), ...model.get("classes").map((name) => new Option(name, name)));
    order();
  }

  function order() {
    const key = SORTS[sort.value], keep = FILTERS[filter.value], k = model.get("classes").indexOf(of.value);
    shown = [...model.get("names").keys()].filter((i) => keep(model, i) && (k < 0 || model.get("truth")[i] === k));
    const keys = new Map(shown.map((i) => [i, key(model, i)]));
    shown.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
    count.textContent = `${shown.length} of ${model.get("names").length}`;
    draw();
  }

  function draw() {
    const columns = Math.max(1, Math.floor((list.clientWidth || 800) / (CELL + 6))), tall = CELL + GAP;
    inner.style.height = `${Math.ceil(shown.length / columns) * tall}px`;
    const first = Math.max(0, Math.floor(list.scrollTop / tall) - 1) * columns;
    const end = first + (Math.ceil(list.clientHeight / tall) + 3) * columns;
    inner.replaceChildren(...shown.slice(first, end).map((i, n) => cell(i, (first + n) % columns, Math.floor((first + n) / columns))));
  }

  function cell(i, column, row) {
    const box = document.createElement("button"), image = document.createElement("div"), words = document.createElement("div");
    const classes = model.get("classes"), truth = model.get("truth")[i], predicted = classes[model.get("predicted")[i]];
    const per = model.get("sheet"), number = Math.floor(i / per ** 2), at = i % per ** 2, url = sheets.get(number);
    box.className = "msvit-thumb";
    box.title = `${model.get("names")[i]}: ${predicted}` + (truth < 0 ? "" : `, it is ${classes[truth]}, loss ${model.get("loss")[i].toFixed(3)}`) +
      `; dense: ${classes[model.get("dense")[i]]}; ${model.get("tokens")[i]} tokens`;
    box.style.cssText = `position:absolute; left:${column * (CELL + 6)}px; top:${row * (CELL + GAP)}px; width:${CELL}px; padding:0; border:0; ` +
      "background:none; cursor:pointer; text-align:left; color:inherit; font:11px/13px var(--jp-ui-font-family, sans-serif)";
    const border = truth < 0 ? "#999" : truth === model.get("predicted")[i] ? "#009E73" : "#D55E00";
    image.style.cssText = `width:${CELL}px; height:${CELL}px; box-sizing:border-box; border:3px solid ${border}`;
    if (url) {
      const scale = CELL - 6;
      image.style.background = `url(${url}) -${(at % per) * scale}px -${Math.floor(at / per) * scale}px / ${per * scale}px`;
    } else if (url === undefined) { sheets.set(number, ""); model.send({ sheet: number }); }
    words.style.cssText = "overflow:hidden; white-space:nowrap; text-overflow:ellipsis";
    words.textContent = `${truth < 0 || truth === model.get("predicted")[i] ? "" : "✗ "}${predicted}`;
    box.append(image, words, `${model.get("tokens")[i]} tokens`);
    box.onclick = () => { model.set("chosen", model.get("names")[i]); model.save_changes(); };
    return box;
  }

  const received = (content, buffers) => {
    if (content.version !== model.get("version")) return;
    sheets.set(content.sheet, URL.createObjectURL(new Blob([buffers[0]], { type: "image/jpeg" })));
    draw();
  };
  model.on("msg:custom", received);
  model.on("change:version", reset);
  list.onscroll = draw;
  const sized = new ResizeObserver(draw);
  sized.observe(list);
  reset();
  return () => { sized.disconnect(); model.off("msg:custom", received); };
}

export default { render };
