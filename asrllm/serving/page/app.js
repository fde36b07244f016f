// Send a file or a recording to the server, and show the text of each segment as it arrives.

import { asFile, clock } from "./formats.js";
import { startRecording } from "./recorder.js";

const find = (id) => document.getElementById(id);
const status = find("status");
const player = find("player");
let segments = [];
let stopRecording = null;
let running = null; // aborts the request of the file before

find("file").addEventListener("change", (event) => {
  if (event.target.files[0]) {
    transcribe(event.target.files[0]);
  }
});

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
    if (stopRecording) {
      const recording = await stopRecording();
      stopRecording = null;
      setRecording(false);
      transcribe(recording);
    } else {
      stopRecording = await startRecording();
      setRecording(true);
      report("Recording");
    }
  } catch (error) {
    stopRecording = null;
    setRecording(false);
    report(`The microphone cannot be used: ${error.message}. Allow it, or choose a file.`, true);
  } finally {
    button.disabled = false;
  }
});

function setRecording(isRecording) {
  find("record").setAttribute("aria-pressed", String(isRecording));
  find("record").textContent = isRecording ? "Stop and transcribe" : "Record";
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
  running?.abort();
  running = new AbortController();
  segments = [];
  find("segments").replaceChildren();
  find("downloads").hidden = true;
  URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(file);
  player.hidden = false;
  report(`Transcribing ${file.name}`);
  try {
    await stream(file, running.signal);
    find("downloads").hidden = false;
    report(segments.length ? "Done" : "No speech was found");
  } catch (error) {
    if (error.name !== "AbortError") {
      report(error.message, true);
    }
  }
}

async function stream(file, signal) {
  const key = find("key").value;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const listed = await fetch("v1/models", { headers, signal });
  await check(listed);
  const form = new FormData();
  form.append("file", file, file.name);
  form.append("model", (await listed.json()).data[0].id);
  form.append("stream", "true");
  for (const name of ["language", "prompt", "hotwords"]) {
    if (find(name).value.trim()) {
      form.append(name, find(name).value.trim());
    }
  }
  const answer = await fetch("v1/audio/transcriptions", { method: "POST", body: form, headers, signal });
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
  button.append(time, segment.text.trim());
  button.addEventListener("click", () => {
    player.currentTime = segment.start;
    player.play();
  });
  const item = document.createElement("li");
  item.append(button);
  find("segments").append(item);
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
