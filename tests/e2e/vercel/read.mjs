// Vercel's `ai` as its documentation uses it: run by `test_outside_clients.py`, `node read.mjs BASE_URL PAGE_URL`.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText, streamText } from 'ai';

const [baseURL, page] = process.argv.slice(2);
const model = createOpenAI({ baseURL, apiKey: 'unused' })('nano');
const content = [{ type: 'image', image: page }, { type: 'text', text: 'Free OCR.' }];
const request = { model, messages: [{ role: 'user', content }], maxRetries: 0 };
const whole = await generateText(request);
const stream = streamText(request);
let text = '';
for await (const piece of stream.textStream) text += piece;
const usage = await stream.usage;
console.log(JSON.stringify({ texts: [whole.text, text], tokens: [whole.usage.outputTokens, usage.outputTokens] }));
