#!/usr/bin/env bash
# Fetch Multi30k, task 1, raw text (Elliott et al. 2016; for research): train, val, test_2016_flickr and test_2017_flickr.
#   bash tools/get_multi30k.sh [DIRECTORY]     default: ./data/multi30k; run again to fetch only what is missing or damaged
#   MULTI30K_URL   where the .gz files lie (default: the corpus's own repository on GitHub; file:// works too)
set -euo pipefail

URL=${MULTI30K_URL:-https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw}
DIRECTORY=${1:-data/multi30k}

fail() {
  echo "get_multi30k.sh: $*" >&2
  exit 1
}

lines_of() { wc -l <"$1" | tr -d ' '; }

# fetch SPLIT LINES LANGUAGE...: each file is written whole or not at all.
fetch() {
  local split=$1 expected=$2 language file found
  shift 2
  for language in "$@"; do
    file=$DIRECTORY/$split.$language
    if [ -f "$file" ] && [ "$(lines_of "$file")" = "$expected" ]; then
      echo "have     $file ($expected lines)"
      continue
    fi
    echo "fetching $file"
    curl --fail --silent --show-error --location --retry 3 --output "$PART.gz" "$URL/$split.$language.gz" ||
      fail "cannot fetch $URL/$split.$language.gz; check the network, or set MULTI30K_URL to a mirror"
    gunzip --stdout "$PART.gz" >"$PART" || fail "$URL/$split.$language.gz is not a whole gzip file; try again"
    found=$(lines_of "$PART")
    [ "$found" = "$expected" ] || fail "$URL/$split.$language.gz has $found lines instead of $expected; nothing was kept of it"
    mv "$PART" "$file"
  done
}

for tool in curl gunzip; do
  command -v "$tool" >/dev/null || fail "$tool is not installed; install it first"
done
mkdir -p "$DIRECTORY"
DIRECTORY=$(cd "$DIRECTORY" && pwd)
PART=$DIRECTORY/.part.$$
trap 'rm -f "$PART" "$PART.gz"' EXIT

echo "Multi30k from $URL into $DIRECTORY"
fetch train 29000 en de fr cs
fetch val 1014 en de fr cs
fetch test_2016_flickr 1000 en de fr cs
fetch test_2017_flickr 1000 en de fr # there is no Czech one
echo "complete. Recipes find it after: export DSTRAIN_DATA=$(dirname "$DIRECTORY")"
