// Write the log-probabilities of the next token after each token of a text, as llama.cpp computes them.
// node logprobs.mjs MODEL.gguf '[{"filePath": …, "scale": …}]' '[token ids]' OUT.f32
// It runs in a folder with node_modules/node-llama-cpp, which brings llama.cpp as a library.

import {writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [model, adapters, tokens, out] = process.argv.slice(2);
const here = createRequire(pathToFileURL(process.cwd() + "/"));
const {getLlama} = await import(pathToFileURL(here.resolve("node-llama-cpp")).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const loaded = await llama.loadModel({modelPath: model});
const context = await loaded.createContext({contextSize: 128, lora: {adapters: JSON.parse(adapters)}});
const options = {temperature: 1, topK: 0, topP: 1, minP: 0};
const input = JSON.parse(tokens).map((token) => [token, {generateNext: {probabilities: true, options}}]);
const results = await context.getSequence().controlledEvaluate(input);
const size = results[0].next.probabilities.size;
const rows = new Float32Array(results.length * size);
results.forEach((result, row) => result.next.probabilities.forEach((p, token) => { rows[row * size + token] = Math.log(p); }));
writeFileSync(out, rows);
process.exit(0);
