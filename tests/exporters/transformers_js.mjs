// Answers each conversation greedily, then all of them as one batch, as a program in Node would.
import {env, pipeline} from "@huggingface/transformers";

const {folder, model, prompts, count} = JSON.parse(process.argv[2]);
env.allowRemoteModels = false;
env.localModelPath = folder;
const generate = await pipeline("text-generation", model);
const options = {max_new_tokens: count, do_sample: false};
const said = (answer) => answer[0].generated_text.at(-1).content;
const turns = prompts.map((content) => [{role: "user", content}]);
const alone = [];
for (const turn of turns) alone.push(said(await generate(turn, options)));
console.log(JSON.stringify({alone, together: (await generate(turns, options)).map(said)}));
