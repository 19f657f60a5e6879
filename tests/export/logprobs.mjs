// Write the log-probabilities of the next token after each token of a text, as llama.cpp computes them.
// node logprobs.mjs MODEL.gguf '[[{"filePath": …, "scale": …}], …]' '[token ids]' OUT.f32
// Each inner list is one setting of scaled adapters; OUT.f32 holds [settings, tokens, vocabulary].
// It runs in a folder with node_modules/node-llama-cpp, which brings llama.cpp as a library.

import {writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [model, settings, tokens, out] = process.argv.slice(2);
const here = createRequire(pathToFileURL(process.cwd() + "/"));
const {getLlama} = await import(pathToFileURL(here.resolve("node-llama-cpp")).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const loaded = await llama.loadModel({modelPath: model});
const options = {temperature: 1, topK: 0, topP: 1, minP: 0};
const input = JSON.parse(tokens).map((token) => [token, {generateNext: {probabilities: true, options}}]);
const blocks = [];
for (const adapters of JSON.parse(settings)) {
    // one thread: several wait for each other actively, which takes six times as long beside another program
    const context = await loaded.createContext({contextSize: 128, threads: 1, lora: {adapters}});
    for (const {next} of await context.getSequence().controlledEvaluate(input)) {
        const row = new Float32Array(next.probabilities.size);
        next.probabilities.forEach((p, token) => { row[token] = Math.log(p); });
        blocks.push(Buffer.from(row.buffer));
    }
    await context.dispose();
}
writeFileSync(out, Buffer.concat(blocks));
process.exit(0);
