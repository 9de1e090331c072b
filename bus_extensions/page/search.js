// The place of search.py: messages by their words, among all that the person may read, and not only the loaded ones.

import { clock, day, h, shown } from "./dom.js";
import { opens } from "./views.js";

export default {
  title: "Search",
  says: 'the newest 100 messages with all of the words, in any case; "in quotes" is a phrase',
  path: "search",
  fields: { q: "Words", from: "From", to: "To" },
  rows: answer => answer.messages,
  columns: {
    when: message => h("a", opens(message.id), `${day(message.ts)} ${clock(message.ts)}`),
    from: message => message.from,
    to: message => message.to,
    message: message => [message.subject, message.msg].filter(Boolean).map(shown).join(": "),
  },
};
