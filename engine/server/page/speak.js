// Reads an answer to whoever listens: whole sentences, not every token, and never in a hurry.

const PAUSE = 2000; // milliseconds at least between two announcements

/** Of one live region. */
export class Speaker {
  constructor(region) {
    this.region = region;
    this.text = ""; // not yet said
    this.timer = 0;
  }

  /** More of the answer. */
  push(text) {
    this.text += text;
    if (this.timer === 0) this.timer = setTimeout(() => this.#sayWhole(), PAUSE);
  }

  #sayWhole() {
    this.timer = 0;
    const end = Math.max(...[". ", "! ", "? ", "\n", "。"].map((mark) => this.text.lastIndexOf(mark) + 1));
    if (end > 0) this.#say(end);
    if (this.text) this.push("");
  }

  /** The answer is over: the rest is said, then `last`. */
  end(last = "") {
    clearTimeout(this.timer);
    this.timer = 0;
    this.text += this.text && last ? ` ${last}` : last;
    this.#say(this.text.length);
  }

  #say(length) {
    this.region.textContent = this.text.slice(0, length);
    this.text = this.text.slice(length);
  }
}
