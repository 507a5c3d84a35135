"""`evenhand bench batch`: batch work beside interactive traffic."""
