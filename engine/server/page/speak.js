// Announces a streamed answer to screen readers, in whole sentences and at a limited rate.

const INTERVAL = 2000; // minimum milliseconds between two announcements

/** Announcer for one live region. */
export class Speaker {
  constructor(region) {
    this.region = region;
    this.text = ""; // not announced yet
    this.timer = 0;
  }

  /** Append text of the answer. */
  push(text) {
    this.text += text;
    if (this.timer === 0) this.timer = setTimeout(() => this.#saySentences(), INTERVAL);
  }

  #saySentences() {
    this.timer = 0;
    const end = Math.max(...[". ", "! ", "? ", "\n", "。"].map((mark) => this.text.lastIndexOf(mark) + 1));
    if (end > 0) this.#say(end);
    if (this.text) this.push("");
  }

  /** Announce the rest of a finished answer, then `last`. */
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
