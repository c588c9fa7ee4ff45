// A client of Octavo as Node users have it: @grpc/grpc-js and @grpc/proto-loader, from the .proto
// file alone. Tries everything once and prints what it saw as JSON, for tests/server/test_node_client.py.
//
//   node client.js '{"proto": FILE, "health": DESCRIPTORS, "address": ..., "guarded": ...,
//                    "secure": ..., "key": ..., "ca": FILE, "image": FILE, "question": TEXT}'
'use strict';

const fs = require('fs');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const given = JSON.parse(process.argv[2]);
const options = { keepCase: true, enums: String, longs: Number, defaults: true, oneofs: true };
const octavo = grpc.loadPackageDefinition(loader.loadSync(given.proto, options)).octavo.v1;
const descriptors = fs.readFileSync(given.health);
const health = grpc.loadPackageDefinition(
  loader.loadFileDescriptorSetFromBuffer(descriptors, options),
).grpc.health.v1;

const LONG = { temperature: 0, max_tokens: 900, ignore_eos: true };

function withImage() {
  const media = { kind: 'MEDIA_KIND_IMAGE', data: fs.readFileSync(given.image) };
  const content = [{ media }, { text: given.question }];
  return {
    conversation: { messages: [{ role: 'user', content }] },
    sampling: { temperature: 0, max_tokens: 32 },
  };
}

// Reads a stream to its end; `onDelta` may cancel it.
function read(call, onDelta = () => {}) {
  return new Promise((resolve) => {
    const deltas = [];
    const done = (code, details) => resolve({ code, details, deltas });
    call.on('data', (delta) => {
      deltas.push(delta);
      onDelta(delta);
    });
    call.on('error', (error) => done(error.code, error.details));
    call.on('end', () => done(grpc.status.OK, ''));
  });
}

function once(client, method, request, metadata = new grpc.Metadata()) {
  return new Promise((resolve) => {
    client[method](request, metadata, (error, reply) => {
      resolve({ code: error ? error.code : grpc.status.OK, details: error && error.details, reply });
    });
  });
}

const tokensOf = (found) => found.deltas.flatMap((delta) => delta.token_ids);
const textOf = (found) => found.deltas.map((delta) => delta.text).join('');

async function streams(client) {
  const found = {};
  const answer = await read(client.Generate(withImage()));
  const last = answer.deltas[answer.deltas.length - 1];
  found.stream = {
    code: answer.code,
    text: textOf(answer),
    num_deltas: answer.deltas.length,
    num_tokens: tokensOf(answer).length,
    media: answer.deltas[0].media,
    finish_reason: last.finish_reason,
    usage: last.usage,
  };
  const cancelled = client.Generate({ text: 'What is it?', sampling: LONG });
  const { code, deltas } = await read(cancelled, () => cancelled.cancel());
  found.cancel = { code, num_deltas: deltas.length };
  const deadline = new Date(Date.now() + 50);
  const late = await read(client.Generate({ text: 'What is it?', sampling: LONG }, { deadline }));
  found.deadline = { code: late.code };
  const short = { temperature: 0, max_tokens: 8, ignore_eos: true };
  const texts = Array.from({ length: 100 }, (_, i) => `Question ${i % 7}?`);
  const many = await Promise.all(
    texts.map((text) => read(client.Generate({ text, sampling: short }))),
  );
  found.many = many.map((each, i) => [texts[i], each.code, tokensOf(each)]);
  return found;
}

async function calls(client) {
  const found = { once: await once(client, 'GenerateOnce', withImage()) };
  const wrong = { text: 'x', sampling: { temperature: -1 } };
  found.wrong = await once(client, 'GenerateOnce', wrong);
  found.zero = await once(client, 'GenerateOnce', { text: 'x', sampling: { max_tokens: 0 } });
  const checker = new health.Health(given.address, grpc.credentials.createInsecure());
  found.health = await once(checker, 'Check', { service: 'octavo.v1.Inference' });
  return found;
}

// A key in the metadata, as documentation tells: `authorization: Bearer KEY`.
async function doors() {
  const request = { text: 'What is it?', sampling: { temperature: 0, max_tokens: 2 } };
  const bearer = new grpc.Metadata();
  bearer.set('authorization', `Bearer ${given.key}`);
  const plain = grpc.credentials.createInsecure();
  const guarded = new octavo.Inference(given.guarded, plain);
  const secure = grpc.credentials.createSsl(fs.readFileSync(given.ca));
  const inTls = new octavo.Inference(given.secure, secure);
  const unknownCa = new octavo.Inference(given.secure, grpc.credentials.createSsl());
  return {
    no_key: await once(guarded, 'GenerateOnce', request),
    key: await once(guarded, 'GenerateOnce', request, bearer),
    tls: await once(inTls, 'GenerateOnce', request, bearer),
    tls_no_key: await once(inTls, 'GenerateOnce', request),
    unknown_ca: await once(unknownCa, 'GenerateOnce', request, bearer),
  };
}

async function main() {
  const client = new octavo.Inference(given.address, grpc.credentials.createInsecure());
  const found = { ...(await streams(client)), ...(await calls(client)), ...(await doors()) };
  process.stdout.write(JSON.stringify(found), () => process.exit(0));
}

main();
