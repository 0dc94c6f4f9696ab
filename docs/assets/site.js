// What scrolls by itself can be reached by the keyboard.
document$.subscribe(() => {
  for (const part of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset table:not([class]), .md-typeset pre > code")) part.tabIndex = 0;
});
