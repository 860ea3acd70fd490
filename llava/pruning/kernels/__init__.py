"""Selection in few launches on a GPU: imported only where there is one, and decides nothing anew."""
