// Drives the gateway with the official openai client for Node and prints what it saw as one JSON line.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const question = [{ role: "user", content: "What is the capital of France?" }];
const seen = {};

const whole = await client.chat.completions.create({ model, messages: question, temperature: 0, max_tokens: 24 });
seen.whole = whole.choices[0].message.content;
seen.usage = whole.usage;

seen.stream = "";
const stream = await client.chat.completions.create({
  model, messages: question, temperature: 0, max_tokens: 24, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  seen.stream += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) seen.streamUsage = chunk.usage;
}

const helper = client.chat.completions.stream({ model, messages: question, temperature: 0, max_tokens: 24 });
seen.helper = await helper.finalContent();

const aborted = await client.chat.completions.create({
  model, messages: question, temperature: 0, max_tokens: 2000, stream: true, ignore_eos: true,
});
for await (const chunk of aborted) {
  if (chunk.choices[0]?.delta?.content) break; // leaving the loop closes the connection
}

const response = await client.responses.create({ model, input: "What is the capital of France?", temperature: 0 });
seen.response = response.output_text;

try {
  await client.chat.completions.create({ model: "no-such-model", messages: question });
} catch (error) {
  seen.error = { status: error.status, code: error.code, name: error.constructor.name };
}
seen.models = (await client.models.list()).data.map((entry) => entry.id);
console.log(JSON.stringify(seen));
