"""A sweep as one page of HTML that needs no network: what goes into it, its tables, figures and charts."""
