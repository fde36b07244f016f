// Charts in a box of WIDTH units. Rows: {label, note, rate, baseline}; baseline is null if there is none.

const WIDTH = 400;

function drawing(height, description, ...children) {
  return svg("svg", {viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": description}, ...children);
}

function text(x, y, words, attributes = {}) {
  return svg("text", {x, y, ...attributes}, words);
}

/** Horizontal bars, the baseline's below the model's. least: the smallest value of a full-length bar. */
function bars(rows, least = 0) {
  const left = 104, room = WIDTH - left - 62;
  const both = rows.some((row) => row.baseline !== null);
  const height = both ? 36 : 32;
  const most = Math.max(...rows.flatMap((row) => [row.rate, row.baseline ?? 0]), least, 1e-9);
  const bar = (kind, value, y) => [
    svg("rect", {class: kind, x: left, y, width: Math.max((room * value) / most, 1), height: 12, rx: 2}),
    text(left + (room * value) / most + 5, y + 10, percent(value), {class: "value"}),
  ];
  const parts = rows.map((row, i) => {
    const y = i * height + 4;
    return svg("g", {},
      svg("title", {}, describe(row)),
      text(left - 6, y + 10, shorten(row.label, 15), {"text-anchor": "end"}),
      text(left - 6, y + 23, row.note, {class: "value", "text-anchor": "end"}),
      bar("model", row.rate, y),
      row.baseline !== null && bar("baseline", row.baseline, y + 15));
  });
  return drawing(rows.length * height + 4, rows.map(describe).join("; "), ...parts);
}

function describe(row) {
  const other = row.baseline === null ? "" : `, Whisper ${percent(row.baseline)}`;
  return `${row.label}: ${percent(row.rate)}${other} (${row.note})`;
}

/** Vertical bars of counts. names: of the bins; series: {kind: counts}. */
function histogram(names, series) {
  const base = 150, step = WIDTH / names.length, kinds = Object.entries(series);
  const most = Math.max(...kinds.flatMap(([, counts]) => counts), 1);
  const width = (step - 5) / kinds.length;
  const parts = names.map((name, i) => svg("g", {},
    svg("title", {}, kinds.map(([kind, counts]) => `${name} %: ${plural(counts[i], "utterance")} (${kind})`).join("; ")),
    kinds.map(([kind, counts], k) => {
      const height = (120 * counts[i]) / most;
      return svg("rect", {class: kind, x: i * step + 2.5 + k * width, y: base - height, width: width - 1, height, rx: 1});
    }),
    text((i + 0.5) * step, base - (120 * Math.max(...kinds.map(([, counts]) => counts[i]))) / most - 4, count(kinds[0][1][i]),
      {class: "value", "text-anchor": "middle"}),
    text((i + 0.5) * step, base + 13, name.replace("over ", ">").replace(/^\d+-/, "\u2264"), {class: "value", "text-anchor": "middle"})));
  const description = names.map((name, i) => `${name} %: ${kinds.map(([kind, counts]) => `${counts[i]} (${kind})`).join(", ")}`).join("; ");
  return drawing(base + 20, description, svg("line", {class: "axis", x1: 0, x2: WIDTH, y1: base, y2: base}), ...parts);
}

/** Rates with their confidence intervals. points: {label, kind, rate, low, high}. */
function forest(points) {
  const left = 150, right = WIDTH - 124, height = 20, bottom = points.length * height + 6;
  const end = niceEnd(Math.max(...points.map((point) => point.high), 1e-9));
  const at = (rate) => left + ((right - left) * rate) / end;
  const grid = [0, 0.25, 0.5, 0.75, 1].map((part) => [
    svg("line", {class: "grid-line", x1: at(part * end), x2: at(part * end), y1: 0, y2: bottom}),
    text(at(part * end), bottom + 12, `${+(part * end).toPrecision(3)}`, {class: "value", "text-anchor": "middle"}),
  ]);
  const marks = points.map((point, i) => {
    const y = i * height + 12;
    return svg("g", {},
      svg("title", {}, interval(point)),
      text(left - 8, y + 4, shorten(point.label, 23), {"text-anchor": "end"}),
      svg("line", {class: `whisker ${point.kind}`, x1: at(point.low), x2: at(point.high), y1: y, y2: y}),
      svg("circle", {class: point.kind, cx: at(point.rate), cy: y, r: 4.5}),
      text(right + 10, y + 4, `${point.rate.toFixed(2)} (${point.low.toFixed(1)}\u2013${point.high.toFixed(1)})`, {class: "value"}));
  });
  return drawing(bottom + 18, points.map(interval).join("; "), ...grid.flat(), ...marks);
}

const interval = (point) => `${point.label}: ${percent(point.rate)}, 95 % CI ${point.low.toFixed(2)} to ${point.high.toFixed(2)} (${point.kind})`;

function niceEnd(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 4, 6, 8, 10].map((step) => step * power).find((end) => end >= most);
}
