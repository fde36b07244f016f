// Capture the microphone at 24 kHz, the rate of live transcription.

const RATE = 24000;
const BLOCK = 2400; // samples that are passed on together, 0.1 s

// Call onBlock with Int16Arrays until the function that is returned stops it.
// That function returns the recording as a WAV file.
export async function startRecording(onBlock) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const context = new AudioContext({ sampleRate: RATE });
  await context.audioWorklet.addModule("page/capture.js");
  const node = new AudioWorkletNode(context, "capture");
  const blocks = [];
  let block = new Int16Array(BLOCK);
  let filled = 0;

  function pass() {
    const samples = block.slice(0, filled);
    blocks.push(samples);
    onBlock(samples);
    filled = 0;
  }

  node.port.onmessage = (event) => {
    for (const sample of event.data) {
      block[filled] = 32767 * Math.max(-1, Math.min(1, sample));
      filled += 1;
      if (filled === BLOCK) {
        pass();
      }
    }
  };
  context.createMediaStreamSource(stream).connect(node);

  return async function stopRecording() {
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
    node.port.onmessage = null;
    pass();
    return new File([header(blocks), ...blocks], "recording.wav", { type: "audio/wav" });
  };
}

function header(blocks) {
  const count = blocks.reduce((sum, block) => sum + block.length, 0);
  const view = new DataView(new ArrayBuffer(44));
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
  return view;
}
