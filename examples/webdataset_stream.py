"""Pack any webdataset stream online: tars that another tool wrote, a `pipe:`, no index.

Shows `pipeline.pack_stream` as a stage of webdataset. It applies the native-size rule and the packer of planned training to a bounded
buffer of samples. A prepared or indexed corpus gives in addition: equal cost on every rank, exact resume, no sample lost, one seeded
global order (`help(pipeline.pack_stream)`).

    python examples/webdataset_stream.py "shards/{000000..000099}.tar"
    python examples/webdataset_stream.py "pipe:aws s3 cp s3://bucket/000000.tar -" --max-tokens 1024 --tokens-per-pack 4096
"""

from __future__ import annotations

import argparse
from itertools import islice

import webdataset

import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="+", help="URLs of tars, in webdataset's notation")
    parser.add_argument("--stride", type=int, default=16, help="pixels per token side")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--tokens-per-pack", type=int, default=128)
    parser.add_argument("--packs", type=int, default=4, help="packs to show")
    given = parser.parse_args()

    pack = pipeline.pack_stream(max_tokens=given.max_tokens, tokens_per_pack=given.tokens_per_pack, stride=given.stride)
    shards = [url for urls in given.corpus for url in webdataset.SimpleShardList(urls).urls]
    # Images stay undecoded here: pipeline's own decoder turns them upright and to sRGB. `.decode("pil")` and "rgb8" work as well.
    packs = webdataset.WebDataset(shards, shardshuffle=False).decode(only="txt").compose(pack)

    images = tokens = 0
    for number, found in enumerate(islice(packs, given.packs)):
        images, tokens = images + len(found.images), tokens + found.tokens
        first = found.images[0]
        caption = found.samples[0].get("txt", "")
        print(f"pack {number}: {len(found.images)} images, {found.tokens} tokens; first {first.shape[2]}x{first.shape[1]}: {caption}")
    print(f"{images} images in {tokens} tokens; left out: {dict(pack.left_out) or 'none'}")


if __name__ == "__main__":
    main()
