// ONNX Runtime's CPU attention on the shapes of bench_kernel.cpp: milliseconds of alternating runs, median and fastest.
//
//   npm install --ignore-scripts onnxruntime-node && node onnxruntime.js [threads]        (in a copy of this folder)
//
// standard      std_c*.onnx: one MultiHeadAttention (com.microsoft) of two heads (64, 64)
// differential  diff_c*.onnx: two MultiHeadAttention of one head (64, V 128) and a subtraction, the best that its
//               operators compose
// c0 is full, c1 causal (unidirectional). GFLOP/s count 8d FLOP a visible pair, as bench_kernel.cpp does.
const ort = require('onnxruntime-node');
const path = require('path');

const kD = 64;

async function open(kind, causal, threads) {
  const options = {intraOpNumThreads: threads, interOpNumThreads: 1};
  return ort.InferenceSession.create(path.join(__dirname, `${kind}_c${causal}.onnx`), options);
}

function operands(kind, n) {
  const random = width =>
      new ort.Tensor('float32', Float32Array.from({length: n * width}, () => Math.random() * 6 - 3), [1, n, width]);
  if (kind === 'std') return {q: random(2 * kD), k: random(2 * kD), v: random(2 * kD)};
  return {q1: random(kD), k1: random(kD), q2: random(kD), k2: random(kD), v: random(2 * kD)};
}

function median(values) {
  return values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
}

async function main() {
  const threads = Number(process.argv[2] || 1);
  for (const causal of [0, 1]) {
    for (const n of [384, 1920, 7680]) {
      const kinds = {};
      for (const kind of ['std', 'diff']) {
        kinds[kind] = {session: await open(kind, causal, threads), feed: operands(kind, n), times: []};
      }
      for (let run = 0, runs = n > 4000 ? 5 : n > 1000 ? 11 : 41; run < runs; ++run) {
        for (const {session, feed, times} of Object.values(kinds)) {
          const start = process.hrtime.bigint();
          await session.run(feed);
          if (run > 0) times.push(Number(process.hrtime.bigint() - start) / 1e6);  // the first one warms up
        }
      }
      const pairs = causal ? n * (n + 1) / 2 : n * n;
      const text = kind => {
        const ms = median(kinds[kind].times);
        const fastest = Math.min(...kinds[kind].times);
        return `${ms.toFixed(2)} ms (${fastest.toFixed(2)}), ${(8 * kD * pairs / ms / 1e6).toFixed(1)} GFLOP/s`;
      };
      console.log(`${causal ? 'causal' : 'full'}, n ${n}, ${threads} thread(s):  ` +
                  `standard ${text('std')}  differential ${text('diff')}`);
    }
  }
}

main();
