"""``uemb demo``: the whole pipeline on real data, in one command."""
