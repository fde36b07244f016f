// The transcript as a file. A segment has start and end in seconds, and its text.

export function asFile(segments, format) {
  const texts = segments.filter((segment) => segment.text.trim());
  switch (format) {
    case "srt":
      return texts.map((segment, i) => `${i + 1}\n${times(segment, ",")}\n${segment.text.trim()}\n\n`).join("");
    case "vtt":
      return "WEBVTT\n\n" + texts.map((segment) => `${times(segment, ".")}\n${escaped(segment.text)}\n\n`).join("");
    case "json":
      return JSON.stringify({ segments: texts.map(({ start, end, text }) => ({ start, end, text })) }, null, 2) + "\n";
    default:
      return texts.map((segment) => segment.text.trim()).reduce(join, "") + "\n";
  }
}

// Chinese and Japanese characters have no spaces between them.
const CHARACTER = "[\\u3000-\\u30ff\\u3400-\\u9fff\\uff00-\\uff9f\\u{20000}-\\u{3ffff}]";

function join(before, after) {
  const hasSpace = before && !(new RegExp(`${CHARACTER}$`, "u").test(before) && new RegExp(`^${CHARACTER}`, "u").test(after));
  return before + (hasSpace ? " " : "") + after;
}

export function clock(seconds, point = ".") {
  const milliseconds = Math.round(1000 * seconds);
  const pad = (value, digits) => String(value).padStart(digits, "0");
  const hours = Math.floor(milliseconds / 3600000);
  const minutes = Math.floor(milliseconds / 60000) % 60;
  const whole = Math.floor(milliseconds / 1000) % 60;
  return `${pad(hours, 2)}:${pad(minutes, 2)}:${pad(whole, 2)}${point}${pad(milliseconds % 1000, 3)}`;
}

function times(segment, point) {
  return `${clock(segment.start, point)} --> ${clock(segment.end, point)}`;
}

function escaped(text) {
  return text.trim().replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}
