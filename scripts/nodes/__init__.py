"""Parts of scripts/nodes.sh: two nodes on one machine, runs on them, and what may happen to them."""
