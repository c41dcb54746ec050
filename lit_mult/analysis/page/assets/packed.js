// Reads what analysis/page/packing.py writes.

/** The bytes behind base64; a loop, as `Uint8Array.from` takes ten times as long for megabytes. */
function decoded(text) {
  const content = atob(text);
  const bytes = new Uint8Array(content.length);
  for (let place = 0; place < bytes.length; place++) bytes[place] = content.charCodeAt(place);
  return bytes;
}

/** @returns {Promise<Uint8Array>} the bytes behind base64 of a zlib stream */
async function inflated(text) {
  const stream = new Blob([decoded(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpacked(text) {
  return JSON.parse(new TextDecoder().decode(await inflated(text)));
}

/** @returns {Object<string, any[]>} name -> values, a row each */
function unpackedColumns({ length, columns }) {
  const read = (column) => {
    if ("all" in column) return Array(length).fill(column.all);
    return column.each ?? column.at.map((place) => column.of[place]);
  };
  return Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, read(column)]));
}

/** @returns {Object<string, any>[]} a row each */
function unpackedRows(packed) {
  const columns = Object.entries(unpackedColumns(packed));
  return Array.from({ length: packed.length }, (_, row) => Object.fromEntries(columns.map(([name, values]) => [name, values[row]])));
}

/**
 * @typedef {{steps: number[], values: (number|null)[]}} Curve
 * @returns {Promise<(number) => Curve>} the curve at a place
 */
async function unpackedCurves(text) {
  const bytes = await inflated(text);
  const end = bytes.indexOf(10);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(0, end)));
  const points = (bytes.length - end - 1) / 2;
  const codes = new Uint16Array(points);
  for (let place = 0, code = 0; place < points; place++) {
    code = (code + bytes[end + 1 + place] + 256 * bytes[end + 1 + points + place]) & 0xffff;
    codes[place] = code;
  }
  const starts = [0];
  for (const [length] of header) starts.push(starts.at(-1) + length);
  return (place) => {
    const [length, low, high, first, stride, others] = header[place];
    const regular = length - others.length;
    const values = Array.from(codes.subarray(starts[place], starts[place + 1]), (code) =>
      code === 0xffff ? null : low + (code * (high - low)) / 0xfffe);
    const steps = Array.from({ length }, (_, point) => (point < regular ? first + stride * point : others[point - regular]));
    return { steps, values };
  };
}
