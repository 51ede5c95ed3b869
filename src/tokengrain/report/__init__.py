"""Reports: one self-contained HTML file per run, heat maps in the terminal, pictures for documents."""
