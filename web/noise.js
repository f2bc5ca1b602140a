// torch.randn(n, generator=torch.Generator().manual_seed(seed)) on a CPU, to about 1e-6.
const N = 624, M = 397;

// MT19937 (Matsumoto and Nishimura 1998). Of a seed only the lower 32 bits count, as in PyTorch.
function mersenneTwister(seed) {
  const state = new Uint32Array(N);
  state[0] = seed % 2 ** 32;
  for (let i = 1; i < N; i++) {
    const x = state[i - 1] ^ (state[i - 1] >>> 30);
    state[i] = Math.imul(1812433253, x) + i;
  }
  let at = N;
  return () => {
    if (at === N) {
      for (let i = 0; i < N; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % N] & 0x7fffffff);
        state[i] = state[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    let y = state[at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

// n normal numbers, n at least 16. As PyTorch does: n uniform numbers of 24 bits, then Box-Muller
// on blocks of 16, whose first eight are radii and last eight angles. The last block, where 16 does
// not divide n, is drawn anew.
export function randn(n, seed) {
  const draw = mersenneTwister(seed);
  const uniform = () => (draw() & 0xffffff) / 2 ** 24;
  const x = Float32Array.from({length: n}, uniform);
  for (let i = 0; i + 16 <= n; i += 16) boxMuller(x.subarray(i, i + 16));
  if (n % 16) boxMuller(x.subarray(n - 16).map(uniform), x.subarray(n - 16));
  return x;
}

function boxMuller(u, out = u) {
  for (let i = 0; i < 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - u[i]));
    const angle = 2 * Math.PI * u[i + 8];
    out[i] = radius * Math.cos(angle);
    out[i + 8] = radius * Math.sin(angle);
  }
}
