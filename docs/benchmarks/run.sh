#!/usr/bin/env bash
# The measurements of this folder. Each call of `measure` writes a CSV, with its own command above it.
#
#   docs/benchmarks/run.sh cpu      # an hour and a half of one core
#   docs/benchmarks/run.sh cuda     # a graphics card
#   docs/benchmarks/run.sh quick    # a graphics card, ten minutes; `make gpu` runs it
#
# OUT is the folder to write to; AGENTSD is the command to measure with.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-docs/benchmarks}
ours=(--schedule faithful --schedule fast --schedule paper)
agents=(--schedule docs/benchmarks/agents-256.yaml)
cached=(--schedule faithful --schedule balanced --schedule turbo --no-baselines --steps 25)

measure() { # NAME OPTION...
  ${AGENTSD:-agentsd} benchmark "${ours[@]}" "${@:2}" --out "$out/$1.csv"
}

measure_runs() { # NAME OPTION...
  agentsd benchmark "${cached[@]}" "${@:2}" --out "docs/benchmarks/$1.csv"
}

on_cpu() {
  local core=(--device cpu --threads 1)
  measure sd15-512-cpu --model sd15 --size 512 "${agents[@]}" "${core[@]}" --rounds 5
  measure sd15-512-cpu-compile --model sd15 --size 512 "${core[@]}" --no-baselines --compile --rounds 3
  measure sd15-1024-cpu --model sd15 --size 1024 --batch 1 "${agents[@]}" "${core[@]}" --rounds 3
  measure sdxl-1024-cpu --model sdxl --size 1024 --batch 1 "${agents[@]}" "${core[@]}" --rounds 2
  measure_runs sd15-512-cpu-runs --model sd15 "${core[@]}" --rounds 3
  measure_runs sdxl-1024-cpu-runs --model sdxl "${core[@]}" --rounds 2
  # How the time of a layer grows, up to 192x192 tokens.
  measure sd15-top-cpu --model sd15-top --size 512 --size 768 --size 1024 --size 1536 --batch 1 \
    "${agents[@]}" "${core[@]}" --rounds 3
  # Where there is least to gain: no preset may be slower than unpatched.
  measure sd15-small-cpu --model sd15 --size 256 --size 384 "${core[@]}" --no-baselines --rounds 5
  measure pocket-cpu --model pocket --size 64 --size 128 --size 192 --size 256 \
    "${agents[@]}" "${core[@]}" --rounds 25
}

on_cuda() {
  local card=(--device cuda --dtype float16 --rounds 20)
  for compiled in "" --compile; do
    measure "sd15-cuda${compiled#-}" --model sd15 --size 512 --size 768 --size 1024 --size 1536 \
      --size 2048 "${agents[@]}" "${card[@]}" $compiled
    measure "sdxl-cuda${compiled#-}" --model sdxl --size 1024 --size 1536 --size 2048 \
      "${agents[@]}" "${card[@]}" $compiled
    measure_runs "sd15-cuda-runs${compiled#-}" --model sd15 "${card[@]}" $compiled
    measure_runs "sdxl-cuda-runs${compiled#-}" --model sdxl "${card[@]}" $compiled
  done
}

quick() {
  local card=(--device cuda --dtype float16 --no-baselines)
  measure sd15-quick --model sd15 --size 512 --size 1024 "${card[@]}" --rounds 10
  measure sdxl-quick --model sdxl --size 1024 "${card[@]}" --rounds 10
  measure sd15-quick-compile --model sd15 --size 512 "${card[@]}" --rounds 5 --compile
}

case "${1:-}" in
  cpu) on_cpu ;;
  cuda) on_cuda ;;
  quick) quick ;;
  *) echo "usage: $0 cpu|cuda|quick" >&2; exit 2 ;;
esac
