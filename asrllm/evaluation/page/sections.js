// The sections above the table of utterances: the summary of all sets, and the figures of one.

const NAMES = {wer: "WER", cer: "CER", mer: "MER"};
const UNITS = {wer: "words", cer: "characters", mer: "words and characters"};
const KINDS = {sub: "substitutions", del: "deletions", ins: "insertions"};
const SPEAKERS = 15; // per figure
const WRONG = {SUBSTITUTIONS: "Substitutions", DELETIONS: "Deletions", INSERTIONS: "Insertions"};

const ABOUT = {normalizer: "normalizer", prompt: "prompt", weights: "weights"};

/** Divide the keys of ABOUT into those with the same value for all sets and the others. */
function aboutKeys(sets) {
  const values = (key) => new Set(sets.filter((set) => !set.pooled).map((set) => set.about[key]));
  const keys = Object.keys(ABOUT).filter((key) => values(key).size > 1 || !values(key).has(undefined));
  return {same: keys.filter((key) => values(key).size === 1), different: keys.filter((key) => values(key).size > 1)};
}

function aboutList(sets) {
  return aboutKeys(sets).same.flatMap((key) => [html("dt", {}, ABOUT[key]), html("dd", {}, sets[0].about[key])]);
}

function summaryTable(sets) {
  const about = aboutKeys(sets).different;
  const head = ["set", "", ...Object.values(NAMES), "bootstrap unit", "utterances", "hours", "RTFx", ...about.map((key) => ABOUT[key])];
  return [
    html("caption", {class: "unseen"}, "Error rates of the test sets in per cent with 95 % confidence intervals"),
    html("thead", {}, html("tr", {}, head.map((title) => html("th", {scope: "col"}, title)))),
    ...sets.map((set) => summaryOf(set, about)),
  ];
}

function summaryOf(set, about) {
  const rows = set.baseline ? 3 : 1;
  const once = (content, attributes = {}) => html("td", {rowspan: rows, ...attributes}, content);
  const body = html("tbody", {class: set.pooled ? "pooled" : null}, html("tr", {},
    html("th", {scope: "rowgroup", rowspan: rows}, set.name),
    html("td", {}, "this model"),
    rateCells(set, set.model),
    once(`${set.model.ci95_by}`), once(count(set.utterances)), once(set.hours.toFixed(2)), once(set.about.rtfx ?? "\u2013"),
    about.map((key) => once(set.about[key] ?? "\u2013", {class: "long"}))));
  if (set.baseline) {
    body.append(html("tr", {}, html("td", {}, "Whisper"), rateCells(set, set.baseline)));
    body.append(html("tr", {}, html("td", {}, "difference"), Object.keys(NAMES).map((name) => differenceCell(set, name))));
  }
  return body;
}

function rateCells(set, side) {
  return Object.keys(NAMES).map((name) => {
    const [low, high] = side[`${name}_ci95`];
    return html("td", {class: name === set.metric ? "main" : "aside"},
      html("span", {class: "rate"}, side[name].toFixed(2)),
      html("span", {class: "interval"}, `${low.toFixed(2)}\u2013${high.toFixed(2)}`));
  });
}

/** The confidence interval of the difference exists only for the main metric. */
function differenceCell(set, name) {
  const {difference, difference_ci95: [low, high], p} = set.comparison;
  if (name !== set.metric) return html("td", {class: "aside"}, signed(set.model[name] - set.baseline[name]));
  const sure = p < 0.05;
  const verdict = sure && high < 0 ? "better" : sure && low > 0 ? "worse" : "inconclusive";
  return html("td", {class: `main ${verdict}`},
    html("span", {class: "rate"}, signed(difference)),
    html("span", {class: "interval"}, `${signed(low)} to ${signed(high)}`),
    html("span", {class: "verdict"}, `${verdict}, p = ${p.toPrecision(2)}`));
}

function forestOf(sets) {
  const points = sets.flatMap((set) => [["model", set.name], ["baseline", "Whisper"]].filter(([kind]) => set[kind]).map(([kind, label]) => {
    const [low, high] = set[kind][`${set.metric}_ci95`];
    return {label, kind, rate: set[kind][set.metric], low, high};
  }));
  return points.length > 1 ? [figure("Error rates in per cent with 95 % confidence intervals", "", forest(points))] : [];
}

function figure(title, note, ...content) {
  return html("figure", {}, html("figcaption", {}, html("strong", {}, title), note && html("small", {}, note)), ...content);
}

function seriesLegend(set) {
  const mark = (kind) => svg("svg", {viewBox: "0 0 12 12", class: "mark", "aria-hidden": "true"},
    svg("rect", {class: kind, x: 1, y: 1, width: 10, height: 10, rx: 2}));
  if (!set.baseline) return [];
  return [html("span", {}, mark("model"), " this model"), html("span", {}, mark("baseline"), " Whisper (the audio encoder\u2019s original model)")];
}

function figures(set) {
  const {model, baseline, metric} = set;
  const percentage = (kind) => ({
    label: KINDS[kind], note: count(model.counts[kind]), rate: model.percentages[kind], baseline: baseline ? baseline.percentages[kind] : null,
  });
  const row = (of) => ({label: of.name || "(unknown)", note: `${count(of.utterances)} utt.`, rate: of.rate, baseline: of.baseline});
  const series = {model: model.rates, ...(baseline ? {baseline: baseline.rates} : {})};
  const most = Math.max(...set.by_speaker.flatMap((of) => [of.rate, of.baseline ?? 0]));
  const speakers = (first) => figure(`${NAMES[metric]} by speaker`, `${first + 1}\u2013${Math.min(first + SPEAKERS, set.speakers)} of ${count(set.speakers)}, worst first`,
    bars(set.by_speaker.slice(first, first + SPEAKERS).map(row), most));
  return [
    figure("Error types", `% of ${count(set.units)} reference ${UNITS[metric]}`, bars(Object.keys(KINDS).map(percentage))),
    figure("Utterances by error rate", `number of utterances by ${NAMES[metric]} in %`, histogram(set.rate_bins, series)),
    figure(`${NAMES[metric]} by duration`, "", bars(set.by_duration.map(row))),
    set.by_corpus.length > 0 && figure(`${NAMES[metric]} by corpus`, "", bars(set.by_corpus.map(row))),
    ...set.by_speaker.flatMap((_, i) => (i % SPEAKERS === 0 ? [speakers(i)] : [])),
  ].filter(Boolean);
}

function flagTable(set, flags, choose) {
  const cell = (side, flag) => {
    const n = side.hallucinations[flag];
    return `${count(n)} (${percent((100 * n) / Math.max(set.utterances, 1), 1)})`;
  };
  const head = [["flag"], ["meaning"], ["utterances", "number"], ...(set.baseline ? [["Whisper", "number"]] : [])];
  return [
    html("caption", {class: "unseen"}, "Utterances with hallucination flags"),
    html("thead", {}, html("tr", {}, head.map(([title, kind]) => html("th", {scope: "col", class: kind}, title)))),
    html("tbody", {}, Object.entries(flags).map(([flag, meaning]) => html("tr", {},
      html("th", {scope: "row"}, html("button", {type: "button", class: "chip", title: "show these utterances", click: () => choose(flag)}, flag)),
      html("td", {}, meaning),
      html("td", {class: "number"}, cell(set.model, flag)),
      set.baseline && html("td", {class: "number"}, cell(set.baseline, flag))))),
  ];
}

function lengthRatio(set) {
  const ratio = (side) => side.hallucinations.length_ratio.toFixed(3);
  const other = set.baseline ? ` (Whisper: ${ratio(set.baseline)})` : "";
  const empty = set.empty_references ? ` ${plural(set.empty_references, "utterance")} had an empty reference.` : "";
  const lost = set.unreadable ? ` ${plural(set.unreadable, "utterance")} could not be read, and ${set.unreadable === 1 ? "is" : "are"} not in the rates.` : "";
  return `Hypothesis units per reference unit: ${ratio(set.model)}${other}.${empty}${lost}`;
}

function wrongLists(set) {
  return Object.entries(WRONG).map(([kind, title]) => figure(title, "", set.wrong[kind].length
    ? html("ol", {class: "wrong"}, set.wrong[kind].map(([what, n]) => html("li", {},
      html("span", {dir: "auto", lang: set.about.lang}, what.replace(" -> ", " \u2192 ")), html("span", {class: "number"}, count(n)))))
    : html("p", {class: "note"}, "none")));
}
