// The official openai client for Node. It prints what worked: one line each.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const question = "What is the capital of France?";
const answer = "The capital of France is Paris.";
const asked = { model, messages: [{ role: "user", content: question }], temperature: 0, max_tokens: 24 };

const whole = await client.chat.completions.create(asked);
assert.equal(whole.choices[0].message.content, answer);
assert.equal(whole.usage.completion_tokens, 8);
console.log("chat");

let said = "", usage;
const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  said += chunk.choices[0]?.delta?.content ?? "";
  usage ??= chunk.usage;
}
assert.deepEqual([said, usage.completion_tokens], [answer, 8]);
console.log("streams with usage");

assert.equal(await client.chat.completions.stream(asked).finalContent(), answer);
console.log("its stream helper");

const answers = await Promise.all(Array.from({ length: 8 }, () => client.chat.completions.create(asked)));
assert.deepEqual(new Set(answers.map((one) => one.choices[0].message.content)), new Set([answer]));
console.log("eight at once");

const response = await client.responses.create({ model, input: question, temperature: 0 });
assert.equal(response.output_text, answer);
console.log("responses");

assert.deepEqual((await client.models.list()).data.map((one) => one.id), [model]);
console.log("models");

await assert.rejects(
  client.chat.completions.create({ ...asked, model: "no-such-model" }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
);
console.log("errors as its own exceptions");
