// Runs in the audio thread, and passes on every block of the microphone.

class Capture extends AudioWorkletProcessor {
  process(inputs) {
    const channel = inputs[0][0];
    if (channel) {
      this.port.postMessage(channel.slice());
    }
    return true;
  }
}

registerProcessor("capture", Capture);
