// A trace against a kit, in JavaScript without dependencies: node reader.mjs KIT_DIR trace.safetensors
// Prints the first point that is off by more than its budget along the run. Status 0: agrees, 1: differs, 2: bad input.
// The forms of a trace, of a sketch and of a kit: FORMAT.md beside.
import { readFileSync } from "node:fs";
import { join } from "node:path";

const SUMS = 1024;

function open(path) {
  const file = readFileSync(path);
  const length = file.length < 8 ? Infinity : Number(file.readBigUInt64LE(0));
  if (length > file.length - 8) throw new Error(`${path} is no whole safetensors file`);
  const header = JSON.parse(file.toString("utf8", 8, 8 + length));
  return { header, data: file.subarray(8 + length) };
}

function half(h) {
  const exponent = (h >> 10) & 31;
  const mantissa = h & 1023;
  const size = exponent === 31 ? (mantissa ? NaN : Infinity) : exponent ? (1024 + mantissa) * 2 ** (exponent - 25) : mantissa * 2 ** -24;
  return h >> 15 ? -size : size;
}

const READ = {
  F64: [8, (view, at) => view.getFloat64(at, true)],
  F32: [4, (view, at) => view.getFloat32(at, true)],
  I64: [8, (view, at) => Number(view.getBigInt64(at, true))],
  F16: [2, (view, at) => half(view.getUint16(at, true))],
  BF16: [2, (view, at) => new Float32Array(new Uint32Array([view.getUint16(at, true) << 16]).buffer)[0]],
};

function tensor(file, name) {
  const entry = file.header[name];
  if (!entry || !(entry.dtype in READ)) return null;
  const [begin, end] = entry.data_offsets;
  const [width, read] = READ[entry.dtype];
  const view = new DataView(file.data.buffer, file.data.byteOffset + begin, end - begin);
  return Float64Array.from({ length: (end - begin) / width }, (_, i) => read(view, i * width));
}

function sketch(values) {
  const sums = new Float64Array(SUMS);
  const wrap = (z) => BigInt.asUintN(64, z);
  values.forEach((value, i) => {
    let z = wrap(BigInt(i + 1) * 0x9e3779b97f4a7c15n);
    z = wrap((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n);
    z = wrap((z ^ (z >> 27n)) * 0x94d049bb133111ebn);
    z = z ^ (z >> 31n);
    sums[Number(z & 1023n)] += z & 1024n ? -value : value;
  });
  return sums;
}

function relative(a, b, norm) {
  let gap = 0;
  let total = 0;
  for (let i = 0; i < a.length; i++) {
    gap += (a[i] - b[i]) ** 2;
    total += b[i] ** 2;
  }
  const size = norm ?? Math.sqrt(total);
  return size > 0 ? Math.sqrt(gap) / size : gap > 0 ? Infinity : 0;
}

function main(folder, path) {
  const kit = open(join(folder, "kit.safetensors"));
  const theirs = open(path);
  let met = 0;
  for (const line of readFileSync(join(folder, "budgets.tsv"), "utf8").split("\n")) {
    const [name, budget, norm] = line.split("\t");
    const whole = tensor(kit, name);
    const sums = tensor(kit, `${name}:sketch`);
    const values = tensor(theirs, name);
    if (!values || !(whole ?? sums) || (whole && whole.length !== values.length)) continue;
    met++;
    const off = whole ? relative(values, whole) : relative(sketch(values), sums, Number(norm));
    if (!(off <= Number(budget))) {
      console.log(`differs at ${name}: ${off.toExponential(2)}, budget ${Number(budget).toExponential(2)}`);
      return 1;
    }
  }
  if (!met) throw new Error(`no point of the kit is in ${path}`);
  console.log(`agrees: ${met} points`);
  return 0;
}

try {
  process.exitCode = main(...process.argv.slice(2));
} catch (error) {
  console.error(error.message);
  process.exitCode = 2;
}
