// Vercel's AI SDK with @ai-sdk/openai-compatible. It prints what worked: one line each.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "evenhand", baseURL, apiKey: "any", includeUsage: true });
const question = "What is the capital of France?";
const answer = "The capital of France is Paris.";
const asked = { model: provider(name), prompt: question, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };

const whole = await generateText(asked);
assert.deepEqual([whole.text, whole.usage.outputTokens], [answer, 8]);
console.log("generateText");

const stream = streamText(asked);
let said = "";
for await (const part of stream.textStream) said += part;
assert.deepEqual([said, (await stream.usage).outputTokens], [answer, 8]);
console.log("streamText with usage");
