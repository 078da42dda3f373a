"""
Prepare abstracts of scientific papers from arXiv, in GPT-2 tokens.

    python data/scientific_papers/prepare.py --num_samples=20000
    python data/scientific_papers/prepare.py --source=arxiv --query="cat:cs.CL" --num_samples=2000

Streams the abstracts (about 1 GB) of gfissore/arxiv-abstracts-2021 from the Hugging Face Hub: 1,999,486 up to the end
of 2021, about 0.4 billion tokens. --source=arxiv queries the arXiv API instead (https://info.arxiv.org/help/api), 1,000
papers by default, and caches the responses in this folder, from which the next run resumes. Line breaks become spaces.
One abstract in 100 is for validation.
"""

import http.client
import json
import os
import sys
import time
import urllib.parse
import urllib.request
from xml.etree import ElementTree

from tqdm import tqdm

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", ".."))
from data.documents import Files  # noqa: E402
from data.preparation import CORPUS, prepare_script, write_dataset  # noqa: E402

HUB = "hf://datasets/gfissore/arxiv-abstracts-2021@refs/convert/parquet/default/train/*.parquet"
API = "https://export.arxiv.org/api/query"
ATOM, SEARCH = "{http://www.w3.org/2005/Atom}", "{http://a9.com/-/spec/opensearch/1.1/}"
PAUSE, PAGE = 3, 200  # seconds between requests, papers per answer


def ask(query, start, count):
    """Query `count` papers from number `start` on. Return (number of papers in all, list of dicts)."""
    params = dict(search_query=query, start=start, max_results=count, sortBy="submittedDate", sortOrder="ascending")
    request = urllib.request.Request(f"{API}?{urllib.parse.urlencode(params)}", headers={"User-Agent": "plainGPT"})
    for attempt in range(1, 6):  # it fails now and then
        time.sleep(PAUSE * attempt)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                feed = ElementTree.parse(response).getroot()
        except (OSError, http.client.HTTPException, ElementTree.ParseError) as e:
            failure = e
            continue
        total = int(feed.findtext(SEARCH + "totalResults", "0"))
        fields = {"id": "id", "title": "title", "abstract": "summary"}  # ours: theirs
        entries = feed.findall(ATOM + "entry")
        papers = [{name: entry.findtext(ATOM + tag, "") for name, tag in fields.items()} for entry in entries]
        if papers and "/api/errors" in papers[0]["id"]:
            raise ValueError(f"arXiv rejects --query={query}: {papers[0]['abstract']}")
        if papers or total <= start:
            return total, papers
        failure = "empty answer"
    raise OSError(f"cannot query {API} ({failure}); run the same command again to resume, or use --input=FILE")


def fetch(query, count):
    """Download the first `count` abstracts for a query. Return the path of the .jsonl file."""
    path = os.path.join(here, f"arxiv-{urllib.parse.quote(query, safe='')}.jsonl")
    with open(path, "ab+") as f, tqdm(total=count, desc="querying arXiv", unit=" papers") as bar:
        # keep the whole lines of an interrupted call
        f.seek(0)
        lines = [line for line in f if line.endswith(b"\n")]
        size = sum(map(len, lines))
        if size < f.tell():  # else the same file would get another time stamp, and count as other input
            f.truncate(size)

        n, total = len(lines), count
        bar.update(n)
        while n < min(count, total):
            total, papers = ask(query, n, min(PAGE, count - n))
            f.writelines(json.dumps(paper).encode() + b"\n" for paper in papers)
            f.flush()
            n += len(papers)
            bar.update(len(papers))
    return path


if __name__ == "__main__":
    options = dict(column="abstract", val_share=0.01, source="hub", query="cat:cs.LG")
    with prepare_script(__doc__, "input", *CORPUS, **options) as args:
        if args.source not in ("hub", "arxiv"):
            raise ValueError(f"--source={args.source} is not hub or arxiv")
        source = args.input or HUB
        if args.source == "arxiv" and not args.input:
            args.num_samples = args.num_samples or 1000
            source = fetch(args.query, args.num_samples)
        corpus = Files({None: [source]}, args, edit=lambda text: " ".join(text.split()))
        write_dataset(here, corpus, args)
