"""Let the network of a run of gpt_text.py, or of its twin, continue a text.

python gpt/gpt_text.py --compression 50 --update muon --update-lr 0.02 --name low_rank
python gpt/sample.py gpt/runs/low_rank --prompt "def "
"""

from pathlib import Path

import torch

from dlrt import errors
from dlrt.checkpoint import load_network
from dlrt.errors import RunError
from dlrt.flags import COUNT, NATURAL, HelpFormatter, Parser
from dlrt.models import GPT
from dlrt.text import as_text, as_tokens


@errors.boundary()
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--prompt", default="import ", help="what the text begins with")
    parser.add_argument("--length", type=NATURAL, default=400, help="bytes to add")
    parser.add_argument("--seed", type=COUNT, default=0, help="of the draws")
    args = parser.parse_args()
    if not args.prompt:
        parser.error("--prompt must have a character at least, got none")
    model, about = load_network(args.run)
    if not isinstance(model, GPT):
        raise RunError(f"{args.run} must be a run of gpt/, got one of {about['network']}")
    draws = torch.Generator().manual_seed(args.seed)
    print(as_text(model.continued(as_tokens(args.prompt), args.length, draws)))


if __name__ == "__main__":
    main()
