"""Looking at what happens: where attention goes, which tokens stay, what it all costs."""
