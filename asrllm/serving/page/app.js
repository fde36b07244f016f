// Send a file or the microphone to the server, and show the text of each segment as it arrives.

import { asFile, clock } from "./formats.js";
import { connectLive } from "./live.js";
import { startRecording } from "./recorder.js";

const find = (id) => document.getElementById(id);
const status = find("status");
const player = find("player");
let served = []; // the models of the server
let segments = [];
let live = null; // the connection of the microphone
let stopRecording = null;
let running = null; // aborts the request of the file before

find("file").addEventListener("change", (event) => {
  if (event.target.files[0]) {
    transcribe(event.target.files[0]);
  }
});

model().catch(() => {}); // with an API key, the models are listed at the first request

find("form").addEventListener("submit", (event) => event.preventDefault());

find("drop").addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
find("drop").addEventListener("dragleave", () => find("drop").classList.remove("over"));
find("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) {
    transcribe(event.dataTransfer.files[0]);
  }
});

find("record").addEventListener("click", async () => {
  const button = find("record");
  button.disabled = true;
  try {
    await (stopRecording ? finish() : record());
  } catch (error) {
    await abandon();
    report(error.message, true);
  } finally {
    button.disabled = false;
  }
});

async function record() {
  running?.abort();
  clear();
  await model(); // an API key that is wrong is an error here
  live = await connectLive(find("key").value, liveSettings(), onLiveEvent);
  try {
    stopRecording = await startRecording(live.append);
  } catch (error) {
    throw new Error(`The microphone cannot be used: ${error.message}. Allow it, or choose a file.`);
  }
  setRecording(true);
  report("Recording");
}

async function finish() {
  setRecording(false);
  report("Transcribing the end");
  const stop = stopRecording;
  stopRecording = null;
  play(await stop());
  await live.finish();
  live = null;
  done();
}

async function abandon() {
  live?.close();
  live = null;
  setRecording(false);
  const stop = stopRecording;
  stopRecording = null;
  if (stop) {
    play(await stop());
    find("downloads").hidden = false;
  }
}

function liveSettings() {
  const keywords = entered("hotwords").split(",").map((word) => word.trim()).filter(Boolean);
  return {
    model: find("model").value,
    language: entered("language") || null,
    prompt: entered("prompt") || null,
    keywords: keywords.length ? keywords : null,
  };
}

async function onLiveEvent(event) {
  const segment = segments.find((one) => one.id === event.item_id);
  switch (event.type.split(".").pop()) {
    case "speech_started":
      add({ id: event.item_id, start: event.audio_start_ms / 1000, end: Infinity, text: "" });
      break;
    case "speech_stopped":
      segment.end = event.audio_end_ms / 1000;
      break;
    case "delta":
      setText(segment, segment.text + event.delta);
      break;
    case "completed":
      if (segment) { // silence is an item, and no segment
        setText(segment, event.transcript);
      }
      break;
    case "failed":
      report(event.error.message, true);
      break;
    case "error":
      if (stopRecording) {
        await abandon();
      }
      report(event.error.message, true);
  }
}

function setRecording(isRecording) {
  find("record").setAttribute("aria-pressed", String(isRecording));
  find("record").textContent = isRecording ? "Stop" : "Record";
}

find("downloads").addEventListener("click", (event) => {
  const format = event.target.dataset.format;
  if (!format) {
    return;
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asFile(segments, format)], { type: "text/plain" }));
  link.download = `transcript.${format}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

async function transcribe(file) {
  await abandon();
  running?.abort();
  running = new AbortController();
  clear();
  play(file);
  report(`Transcribing ${file.name}`);
  try {
    await stream(file, running.signal);
    done();
  } catch (error) {
    if (error.name !== "AbortError") {
      report(error.message, true);
    }
  }
}

function clear() {
  segments = [];
  find("segments").replaceChildren();
  find("downloads").hidden = true;
  player.hidden = true;
}

function play(file) {
  URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(file);
  player.hidden = false;
}

function done() {
  find("downloads").hidden = false;
  if (!status.classList.contains("error")) {
    report(segments.length ? "Done" : "No speech was found");
  }
}

function authorization() {
  const key = find("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function model(signal) {
  const listed = await fetch("v1/models", { headers: authorization(), signal });
  await check(listed);
  served = (await listed.json()).data;
  const names = served.map((one) => one.id);
  const choice = find("model");
  if (names.join() !== [...choice.options].map((option) => option.value).join()) {
    choice.replaceChildren(...names.map((name) => new Option(name)));
  }
  find("models").hidden = names.length === 1;
  offerFields();
  return choice.value;
}

find("model").addEventListener("change", offerFields);

// Disable the fields that the chosen model cannot use.
function offerFields() {
  const { languages, hotwords } = served.find((one) => one.id === find("model").value);
  find("language").disabled = languages.length === 0;
  find("language").placeholder = languages.join(", ");
  find("hotwords").disabled = !hotwords;
}

function entered(name) {
  return find(name).disabled ? "" : find(name).value.trim();
}

async function stream(file, signal) {
  const form = new FormData();
  form.append("file", file, file.name);
  form.append("model", await model(signal));
  form.append("stream", "true");
  for (const name of ["language", "prompt", "hotwords"]) {
    if (entered(name)) {
      form.append(name, entered(name));
    }
  }
  const answer = await fetch("v1/audio/transcriptions", {
    method: "POST",
    body: form,
    headers: authorization(),
    signal,
  });
  await check(answer);
  for await (const event of events(answer.body)) {
    if (event.error) {
      throw new Error(event.error.message);
    }
    if (event.type === "transcript.text.delta") {
      add({ start: event.start, end: event.end, text: event.delta });
    }
  }
}

async function check(answer) {
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Error(problem.error?.message ?? `The server answered with status ${answer.status}.`);
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) {
      return;
    }
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      yield JSON.parse(part.replace(/^data: /, ""));
    }
  }
}

function add(segment) {
  segments.push(segment);
  const time = document.createElement("time");
  time.textContent = clock(segment.start).slice(0, -4);
  const button = document.createElement("button");
  button.type = "button";
  button.append(time, " ", ""); // a screen reader reads the space
  segment.shown = button.lastChild;
  setText(segment, segment.text);
  button.addEventListener("click", () => {
    player.currentTime = segment.start;
    player.play();
  });
  const item = document.createElement("li");
  item.append(button);
  find("segments").append(item);
}

function setText(segment, text) {
  segment.text = text;
  segment.shown.data = text.trim();
}

player.addEventListener("timeupdate", () => {
  const current = segments.findIndex((segment) => player.currentTime >= segment.start && player.currentTime < segment.end);
  [...find("segments").children].forEach((item, i) => {
    item.firstChild.setAttribute("aria-current", String(i === current));
  });
});

function report(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}
