// Words to token ids and back, by the tokenizer.json that goes along with the model.
import {Tokenizer} from "./libraries/tokenizers.min.mjs";

export class StoryTokenizer {
  constructor(file, settings) {
    this.tokenizer = new Tokenizer(file, settings);
  }

  // A user's turn and the opening of the model's, as gemma_multi.chat_template writes them; <bos> is
  // put in front by the tokenizer. `text` may spell no special token: `promptOf` sees to that.
  encode(text) {
    return this.tokenizer.encode(
      `<start_of_turn>user\n${text.trim()}<end_of_turn>\n<start_of_turn>model\n`).ids;
  }

  decode(ids) {
    if (!ids.length) return "";
    const text = this.tokenizer.decode(ids, {skip_special_tokens: true, clean_up_tokenization_spaces: false});
    return text.replace(/\ufffd+$/, ""); // half a character: its other bytes are still to come
  }
}
