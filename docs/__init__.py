"""The documentation's pages, and what makes pictures and the site of them."""
