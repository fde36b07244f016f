"use strict";
// Elements are built from names, attributes and text only: the data is never parsed as HTML.

const maker = (namespace) => (name, attributes = {}, ...children) => {
  const element = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
};
const html = maker("http://www.w3.org/1999/xhtml");
const svg = maker("http://www.w3.org/2000/svg");
const byId = (id) => document.getElementById(id);

const count = (n) => n.toLocaleString("en");
const percent = (rate, digits = 2) => `${rate.toFixed(digits)} %`;
const signed = (x) => `${x < 0 ? "\u2212" : "+"}${Math.abs(x).toFixed(2)}`;
const plural = (n, what) => `${count(n)} ${what}${n === 1 ? "" : "s"}`;
const shorten = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}\u2026` : text);
