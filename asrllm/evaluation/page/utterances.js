// The table of utterances, one page of rows at a time.

const PAGE = 50;
const rateOf = (errors, units) => (errors === 0 ? 0 : units === 0 ? Infinity : (100 * errors) / units);
const ownRate = (row) => rateOf(row.errors, row.units);
const baselineRate = (row) => (row.baseline ? rateOf(row.baseline.errors, row.units) : -1);
const shownRate = (rate) => (rate === Infinity ? "\u221e" : percent(rate, 1));

// descending: the order after the first click
const COLUMNS = [
  {id: "key", of: (row) => row.key},
  {id: "errors", of: (row) => row.errors, descending: true, show: (row) => count(row.errors)},
  {id: "rate", of: ownRate, descending: true, show: (row) => shownRate(ownRate(row))},
  {id: "Whisper", of: baselineRate, descending: true, show: (row) => (row.baseline ? shownRate(baselineRate(row)) : "\u2013")},
  {id: "flags", of: (row) => row.flags.length, descending: true, show: (row) => row.flags.map((flag) => html("span", {class: "chip"}, flag))},
  {id: "speaker", of: (row) => row.speaker},
  {id: "seconds", of: (row) => row.duration, descending: true, show: (row) => row.duration.toFixed(2)},
];

class Utterances {
  /** chosen(): returns the number of the selected set, or null for all. */
  constructor(data, chosen) {
    this.data = data;
    this.chosen = chosen;
    this.columns = COLUMNS.filter((column) => this.has(column.id));
    this.sorting = {column: COLUMNS.find((column) => column.id === "errors"), descending: true};
    this.page = 0;
    for (const row of data.utterances) {
      row.text = [row.key, row.speaker, row.ref, row.hyp, row.baseline ? row.baseline.hyp : ""].join("\n").toLowerCase();
    }
    byId("find").addEventListener("input", () => this.restart());
    byId("flag").append(html("option", {value: ""}, "any"), ...Object.keys(data.flags).map((flag) => html("option", {value: flag}, flag)));
    byId("flag").addEventListener("change", () => this.restart());
    byId("previous").addEventListener("click", () => this.turn(-1));
    byId("next").addEventListener("click", () => this.turn(1));
    this.makeHead();
  }

  has(id) {
    if (id === "speaker") return this.data.utterances.some((row) => row.speaker);
    return id !== "Whisper" || this.data.sets.some((set) => set.baseline);
  }

  makeHead() {
    const heads = this.columns.map((column) => html("th", {scope: "col", "data-column": column.id, class: column.descending ? "number" : null},
      html("button", {type: "button", click: () => this.sortBy(column)}, column.id)));
    byId("table").tHead.rows[0].replaceChildren(html("td", {}), ...heads);
  }

  sortBy(column) {
    const again = this.sorting.column === column;
    this.sorting = {column, descending: again ? !this.sorting.descending : Boolean(column.descending)};
    this.restart();
  }

  /** Filter and sort again, and show the first page. */
  restart() {
    this.page = 0;
    this.rows = this.sorted(this.data.utterances.filter((row) => this.fits(row)));
    this.render();
  }

  fits(row) {
    const set = this.chosen(), flag = byId("flag").value, words = byId("find").value.trim().toLowerCase();
    return (set === null || row.set === set) && (!flag || row.flags.includes(flag)) && row.text.includes(words);
  }

  /** Equal rows remain in the order of the data, worst first. */
  sorted(rows) {
    const {column: {of}, descending} = this.sorting;
    const order = new Intl.Collator("en", {numeric: true});
    const compare = (a, b) => (typeof a === "string" ? order.compare(a, b) : a === b ? 0 : a - b);
    return rows.sort((a, b) => (descending ? compare(of(b), of(a)) : compare(of(a), of(b))));
  }

  turn(by) {
    this.page += by;
    this.render();
    byId("utterances").scrollIntoView();
  }

  render() {
    const first = this.page * PAGE, last = Math.min(first + PAGE, this.rows.length);
    for (const head of byId("table").querySelectorAll("th[data-column]")) {
      const isSorted = head.dataset.column === this.sorting.column.id;
      head.setAttribute("aria-sort", !isSorted ? "none" : this.sorting.descending ? "descending" : "ascending");
    }
    for (const body of [...byId("table").tBodies]) body.remove();
    byId("table").append(...this.rows.slice(first, last).map((row) => this.body(row)));
    byId("place").textContent = this.rows.length ? `${count(first + 1)}\u2013${count(last)} of ${count(this.rows.length)}` : "no matching utterances";
    byId("previous").disabled = this.page === 0;
    byId("next").disabled = last >= this.rows.length;
  }

  body(row) {
    const set = this.data.sets[row.set];
    const body = html("tbody", {}), span = this.columns.length + 1;
    const opener = html("button", {type: "button", class: "opener", "aria-expanded": "false", "aria-label": `unnormalized texts of ${row.key}`});
    opener.addEventListener("click", () => {
      const isOpen = body.classList.toggle("open");
      opener.setAttribute("aria-expanded", String(isOpen));
      if (isOpen) body.append(html("tr", {class: "more"}, html("td", {colspan: span}, html("div", {class: "wide"}, details(row, set)))));
      else body.lastChild.remove();
    });
    const aligned = html("div", {class: "wide"}, alignment(row.aligned, set), row.audio && player(row));
    body.append(
      html("tr", {class: "numbers"}, html("td", {}, opener), this.columns.map((column) => cell(column, row, set, this.chosen() === null))),
      html("tr", {class: "text"}, html("td", {colspan: span}, aligned)));
    return body;
  }
}

function cell(column, row, set, ofSeveral) {
  if (column.id === "key") return html("th", {scope: "row"}, row.key, ofSeveral && html("small", {}, set.name));
  return html("td", {class: column.descending ? "number" : null}, column.show ? column.show(row) : column.of(row));
}

/** aligned: correct text, and lists of incorrect [reference, hypothesis] pairs. */
function alignment(aligned, set) {
  const parts = aligned.flatMap((run) => (typeof run === "string" ? [run] : run.map(wrongPair)));
  const spaced = set.metric === "cer" ? parts : parts.flatMap((part, i) => (i ? [" ", part] : [part]));
  return html("div", {class: "aligned", dir: "auto", lang: set.about.lang}, spaced);
}

function wrongPair([reference, hypothesis]) {
  if (!hypothesis) return html("del", {}, reference);
  if (!reference) return html("ins", {}, hypothesis);
  return html("span", {class: "sub"}, html("del", {}, reference), html("ins", {}, hypothesis));
}

function player(row) {
  return html("audio", {controls: true, preload: "metadata", src: `data:audio/mpeg;base64,${row.audio}`, "aria-label": row.key});
}

function details(row, set) {
  const unit = set.metric === "cer" ? "character" : set.metric === "wer" ? "word" : "unit";
  const raw = (words) => html("span", {class: "raw", dir: "auto", lang: set.about.lang}, words);
  const lines = [
    ["reference", raw(row.ref)],
    ["hypothesis", raw(row.hyp)],
    ["errors", `${plural(row.sub, "substitution")}, ${plural(row.del, "deletion")}, ${plural(row.ins, "insertion")} in ${plural(row.units, unit)}`],
    row.recording && ["recording", row.recording],
    row.end !== "stop" && ["stopped by", row.end],
    row.baseline && ["Whisper", raw(row.baseline.hyp)],
    row.baseline && ["aligned", alignment(row.baseline.aligned, set)],
  ];
  return html("dl", {}, lines.filter(Boolean).flatMap(([name, content]) => [html("dt", {}, name), html("dd", {}, content)]));
}
