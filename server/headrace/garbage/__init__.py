"""When Python's cyclic garbage collector runs, and how long it stops everybody."""
