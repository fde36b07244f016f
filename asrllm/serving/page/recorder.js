// Record the microphone as a WAV file at 16 kHz, which every server reads without ffmpeg.

const RATE = 16000;

export async function startRecording() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const context = new AudioContext({ sampleRate: RATE });
  await context.audioWorklet.addModule("page/capture.js");
  const node = new AudioWorkletNode(context, "capture");
  const blocks = [];
  node.port.onmessage = (event) => blocks.push(event.data);
  context.createMediaStreamSource(stream).connect(node);

  return async function stopRecording() {
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
    return new File([wav(blocks)], "recording.wav", { type: "audio/wav" });
  };
}

function wav(blocks) {
  const count = blocks.reduce((sum, block) => sum + block.length, 0);
  const view = new DataView(new ArrayBuffer(44 + 2 * count));
  const write = (offset, text) => [...text].forEach((c, i) => view.setUint8(offset + i, c.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + 2 * count, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // one channel
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, 2 * count, true);
  let offset = 44;
  for (const block of blocks) {
    for (const sample of block) {
      view.setInt16(offset, 32767 * Math.max(-1, Math.min(1, sample)), true);
      offset += 2;
    }
  }
  return view;
}
