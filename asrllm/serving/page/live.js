// Send speech to the server while it is spoken. See "Live transcription" in docs/serving.md.

const TRANSCRIPTION = "conversation.item.input_audio_transcription";

// Connect, and call onEvent with every event of the server.
// settings has the language, the prompt and the keywords, as far as they are chosen.
export async function connectLive(key, settings, onEvent) {
  const url = new URL("v1/realtime?intent=transcription", document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  const protocols = key ? ["realtime", `openai-insecure-api-key.${key}`] : ["realtime"];
  const socket = new WebSocket(url, protocols);
  const unfinished = new Set(); // items whose text is not complete
  const awaited = new Map(); // types of events, and who waits for them
  let isFinished = false;

  const lost = new Promise((_, reject) => {
    socket.addEventListener("close", () => {
      if (!isFinished) {
        const error = new Error("The live connection ended. The server may be busy: try again later.");
        reject(error);
        onEvent({ type: "error", error });
      }
    });
  });
  lost.catch(() => {}); // nobody may be waiting
  const next = (...types) =>
    Promise.race([lost, ...types.map((type) => new Promise((resolve) => awaited.set(type, resolve)))]);
  const send = (event) => socket.send(JSON.stringify(event));

  socket.addEventListener("message", (message) => {
    const event = JSON.parse(message.data);
    const isEnd = event.type === `${TRANSCRIPTION}.completed` || event.type === `${TRANSCRIPTION}.failed`;
    if (isEnd) {
      unfinished.delete(event.item_id);
    } else if (event.type === "input_audio_buffer.committed") {
      unfinished.add(event.item_id);
    }
    if (event.error?.code !== "input_audio_buffer_commit_empty") { // no speech since the last pause
      onEvent(event);
    }
    awaited.get(isEnd ? "end" : event.type)?.(event);
  });

  await next("session.created");
  send({ type: "session.update", session: { type: "transcription", audio: { input: { transcription: settings } } } });
  const answer = await next("session.updated", "error");
  if (answer.error) {
    isFinished = true;
    socket.close();
    throw new Error(answer.error.message);
  }

  return {
    // Send samples of 16 bits at 24 kHz.
    append(samples) {
      if (socket.readyState === WebSocket.OPEN) {
        const bytes = new Uint8Array(samples.buffer);
        send({ type: "input_audio_buffer.append", audio: btoa(String.fromCharCode(...bytes)) });
      }
    },

    // Wait for the texts of all speech, and disconnect.
    async finish() {
      try {
        send({ type: "input_audio_buffer.commit" });
        send({ type: "input_audio_buffer.clear" }); // its answer comes after the one to the commit
        await next("input_audio_buffer.cleared");
        while (unfinished.size) {
          await next("end");
        }
      } finally {
        this.close();
      }
    },

    close() {
      isFinished = true;
      socket.close();
    },
  };
}
