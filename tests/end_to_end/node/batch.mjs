// Runs a batch with the official openai client for Node, from upload to download, and prints what it saw as one JSON line.
import OpenAI, { toFile } from "openai";
import { setTimeout as pause } from "node:timers/promises";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const line = (custom_id, fields) => JSON.stringify({
  custom_id, method: "POST", url: "/v1/chat/completions",
  body: { model, temperature: 0, max_tokens: 24, messages: [{ role: "user", content: "What is the capital of France?" }], ...fields },
});
const seen = { states: [] };

async function ended(batch) {
  while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
    if (seen.states.at(-1) !== batch.status) seen.states.push(batch.status);
    await pause(100);
    batch = await client.batches.retrieve(batch.id);
  }
  return batch;
}
const start = async (lines, metadata) => {
  const file = await client.files.create({ file: await toFile(Buffer.from(lines.join("\n")), "in.jsonl"), purpose: "batch" });
  return client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h", metadata });
};

let batch = await ended(await start([line("paris"), line("wrong", { temperature: -1 })], { job: "node" }));
seen.status = batch.status;
seen.counts = batch.request_counts;
seen.metadata = batch.metadata;
seen.output = (await (await client.files.content(batch.output_file_id)).text()).trim().split("\n").map(JSON.parse);
seen.errors = (await (await client.files.content(batch.error_file_id)).text()).trim().split("\n").map(JSON.parse);
seen.listed = 0;
for await (const each of client.batches.list({ limit: 1 })) seen.listed += each.id === batch.id; // page by page
const own = [batch.input_file_id, batch.output_file_id, batch.error_file_id];
seen.files = (await client.files.list()).data.filter((file) => own.includes(file.id)).map((file) => file.purpose).sort();
seen.deleted = (await client.files.delete(batch.output_file_id)).deleted;

batch = await start(Array.from({ length: 200 }, (_, at) => line(`long-${at}`, { max_tokens: 1000, ignore_eos: true })));
seen.cancelling = (await client.batches.cancel(batch.id)).status;
seen.cancelled = (await ended(batch)).status;
batch = await ended(await start(["{oops"]));
seen.failed = [batch.status, batch.errors.data.map((error) => [error.line, error.code])];
try {
  await client.batches.retrieve("batch_nothing0");
} catch (error) {
  seen.error = { status: error.status, code: error.code, name: error.constructor.name };
}
console.log(JSON.stringify(seen));
