// A page's card: its image with boxes drawn over it, and its text.

const SVG = "http://www.w3.org/2000/svg";
const MARKUP = /<\|ref\|>([^<]*)<\|\/ref\|>\s*(?:<\|det\|>(\[\[[^<]*\]\])<\|\/det\|>)?/g;
const REST = /<\|\/?(?:ref|det|grounding)\|>|<\|[^>]*$/g;
const LAST = 999; // the largest coordinate in the model's answers
const NUM_HUES = 6;

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export class Card {
  constructor(number) {
    this.number = number;
    this.raw = "";
    this.page = null;
    this.size = null;
    this.hues = new Map();
    this.numDrawn = 0;
    this.title = element("h2", { textContent: `Page ${number}` });
    this.state = element("span", { className: "state", textContent: "waiting" });
    this.picture = element("img", { alt: `Page ${number} of the document`, hidden: true });
    this.overlay = document.createElementNS(SVG, "svg");
    this.overlay.setAttribute("aria-hidden", "true");
    this.text = element("pre", { tabIndex: 0 });
    this.text.setAttribute("aria-label", `Text of page ${number}`);
    this.blocks = element("ol", { className: "blocks", hidden: true });
    this.blocks.setAttribute("aria-label", `Blocks of page ${number}`);
    const view = element("div", { className: "view" }, this.picture, this.overlay);
    const words = element("div", { className: "words" }, this.text, this.blocks);
    this.root = element(
      "li", { className: "card" },
      element("div", { className: "head" }, this.title, this.state),
      element("div", { className: "body" }, view, words),
    );
  }

  show(state, name) {
    this.state.textContent = state;
    this.root.dataset.state = name;
  }

  start(event) {
    this.raw = "";
    this.numDrawn = 0;
    this.text.textContent = "";
    this.setSize(event.dimensions);
    this.show(event.try > 1 ? `reading again (try ${event.try})` : "reading", "reading");
  }

  setPicture(url, size) {
    this.picture.src = url;
    this.picture.hidden = false;
    this.setSize(size);
  }

  setSize(size) {
    this.overlay.replaceChildren();
    if (!size?.width) return;
    this.size = size;
    this.picture.width = size.width;
    this.picture.height = size.height;
    this.overlay.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
  }

  /** Text as the model writes it: markup becomes boxes, the rest is displayed. */
  append(delta) {
    this.raw += delta;
    if (!this.raw.includes("<|")) {
      this.text.append(delta);
      return;
    }
    this.text.textContent = this.raw.replace(MARKUP, "").replace(REST, "").trimStart();
    const found = [...this.raw.matchAll(MARKUP)].filter((match) => match[2]);
    for (const match of found.slice(this.numDrawn)) this.drawMarkup(match[1], match[2]);
    this.numDrawn = found.length;
  }

  drawMarkup(label, boxes) {
    const { width, height } = this.size ?? {};
    if (!width) return;
    for (const [, left, top, right, bottom] of boxes.matchAll(/\[\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\s*\]/g)) {
      const scale = (value, side) => (Math.min(Number(value), LAST) / LAST) * side;
      this.drawBox(label, [scale(left, width), scale(top, height), scale(right, width), scale(bottom, height)]);
    }
  }

  drawBox(label, [left, top, right, bottom]) {
    const box = document.createElementNS(SVG, "rect");
    const places = { x: left, y: top, width: right - left, height: bottom - top };
    for (const [name, value] of Object.entries(places)) box.setAttribute(name, value);
    box.setAttribute("class", `box ${this.hueOf(label)}`);
    const title = document.createElementNS(SVG, "title");
    title.textContent = label || "text";
    box.append(title);
    this.overlay.append(box);
    return box;
  }

  hueOf(label) {
    if (!this.hues.has(label)) this.hues.set(label, `hue-${this.hues.size % NUM_HUES}`);
    return this.hues.get(label);
  }

  /** The page as the service has made it of all that was written. */
  finish(page) {
    this.page = page;
    if (page.dimensions) this.setSize(page.dimensions);
    if (page.status === "failed") {
      this.show("failed", "failed");
      this.text.textContent = page.error?.message ?? "This page could not be read.";
      return;
    }
    const { usage } = page;
    const facts = [page.mode, `${usage.completion_tokens} tokens`];
    if (page.retries) facts.push(`${page.retries} tried again`);
    if (page.finish_reason === "length") facts.push("cut short");
    this.show(facts.filter(Boolean).join(" · "), "done");
    this.text.textContent = page.markdown ?? page.text ?? "";
    this.showBlocks(page.blocks ?? []);
  }

  showBlocks(blocks) {
    this.blocks.replaceChildren();
    this.blocks.hidden = !blocks.some((block) => block.boxes.length);
    for (const block of blocks) {
      const boxes = block.boxes.map((box) => this.drawBox(block.label, box));
      if (!boxes.length) continue;
      const button = element(
        "button", { type: "button", className: `block ${this.hueOf(block.label)}` },
        element("b", { textContent: block.label || "text" }),
        ` ${block.text.slice(0, 80)}`,
      );
      const mark = (isOn) => boxes.forEach((box) => box.classList.toggle("marked", isOn));
      for (const name of ["pointerenter", "focus"]) button.addEventListener(name, () => mark(true));
      for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => mark(false));
      this.blocks.append(element("li", {}, button));
    }
  }

  get result() {
    return this.page?.markdown ?? this.page?.text ?? "";
  }
}
