#include "evaluation/report/html.h"

namespace oryx::evaluation {

// Comforts only: the page says everything without it. Values are read back from the curves' own coordinates,
// so they are stored once.
const char kPageScript[] = R"js(
'use strict';
(() => {
  const root = document.documentElement, svgName = 'http://www.w3.org/2000/svg';

  const themeButton = document.createElement('button');
  const setTheme = dark => {
    root.dataset.theme = dark ? 'dark' : 'light';
    themeButton.textContent = dark ? 'Light theme' : 'Dark theme';
  };
  themeButton.type = 'button';
  themeButton.addEventListener('click', () => setTheme(root.dataset.theme !== 'dark'));
  setTheme(matchMedia('(prefers-color-scheme: dark)').matches);
  document.querySelector('nav').append(themeButton);

  const links = [...document.querySelectorAll('nav a')];
  const markPlace = () => {
    let here = links[0];
    for (const link of links) {
      if (document.querySelector(link.hash).getBoundingClientRect().top < innerHeight / 3) here = link;
    }
    for (const link of links) link.classList.toggle('here', link === here);
  };
  addEventListener('scroll', markPlace, {passive: true});
  markPlace();

  const short = value => {
    const size = Math.abs(value);
    if (size >= 1e4) return value.toLocaleString('en', {maximumFractionDigits: 0});
    return size > 0 && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
  };

  for (const figure of document.querySelectorAll('figure.plot')) {
    const svg = figure.querySelector('.picture svg'), picture = svg.parentNode;
    const names = new Map();
    for (const item of figure.querySelectorAll('.legend li')) {
      names.set(item.dataset.for, item.textContent);
      const group = svg.querySelector(`g[data-series="${item.dataset.for}"]`);
      const toggle = () => {
        const off = group.classList.toggle('off-series');
        for (const label of svg.querySelectorAll(`[data-label="${item.dataset.for}"]`)) label.classList.toggle('off-series', off);
        item.classList.toggle('off', off);
        item.setAttribute('aria-pressed', String(!off));
      };
      item.setAttribute('role', 'button');
      item.setAttribute('aria-pressed', 'true');
      item.tabIndex = 0;
      item.addEventListener('click', toggle);
      item.addEventListener('keydown', event => {
        if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); toggle(); }
      });
    }

    const [left, top, width, height] = svg.dataset.frame.split(' ').map(Number);
    const [x0, x1] = svg.dataset.x.split(' ').map(Number), [y0, y1] = svg.dataset.y.split(' ').map(Number);
    const valueX = x => {
      const share = (x - left) / width;
      return 'logarithmicX' in svg.dataset ? x0 * Math.pow(x1 / x0, share) : x0 + share * (x1 - x0);
    };
    const valueY = y => {
      const share = 1 - (y - top) / height;
      return 'logarithmic' in svg.dataset ? y0 * Math.pow(y1 / y0, share) : y0 + share * (y1 - y0);
    };
    let curves = null;  // parsed when first pointed at
    const parse = () => [...svg.querySelectorAll('g[data-series]')].map(group => {
      const line = group.querySelector('.line');
      const points = line ? line.getAttribute('d').split(/[ML]/).slice(1).map(pair => pair.split(' ').map(Number)) : [];
      return {group, points, colour: line ? line.style.stroke : ''};
    }).filter(curve => curve.points.length > 0);
    const nearest = (points, x) => {
      let low = 0, high = points.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (points[middle][0] < x) low = middle + 1; else high = middle;
      }
      return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
    };

    const cross = document.createElementNS(svgName, 'line');
    cross.setAttribute('class', 'cross');
    cross.setAttribute('y1', top);
    cross.setAttribute('y2', top + height);
    const readout = document.createElement('div');
    readout.className = 'readout';
    const hide = () => { cross.remove(); readout.remove(); };
    svg.addEventListener('pointerleave', hide);
    svg.addEventListener('pointermove', event => {
      curves ??= parse();
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale;
      const shown = curves.filter(curve => !curve.group.classList.contains('off-series'));
      if (x < left || x > left + width || shown.length === 0) { hide(); return; }
      const at = nearest(shown[0].points, x)[0];
      cross.setAttribute('x1', at);
      cross.setAttribute('x2', at);
      svg.append(cross);
      readout.replaceChildren();
      const heading = document.createElement('b');
      heading.textContent = short(valueX(at));
      readout.append(heading);
      for (const curve of shown) {
        const point = nearest(curve.points, at);
        if (Math.abs(point[0] - at) > 12) continue;
        const row = document.createElement('div'), mark = document.createElement('i');
        mark.style.background = curve.colour;
        row.append(mark, `${short(valueY(point[1]))}  ${names.get(curve.group.dataset.series) ?? ''}`);
        readout.append(row);
      }
      picture.append(readout);
      const place = at / scale;
      readout.style.top = `${top / scale + 8}px`;
      readout.style.left = place < box.width / 2 ? `${place + 12}px` : '';
      readout.style.right = place < box.width / 2 ? '' : `${box.width - place + 12}px`;
    });
  }
})();
)js";

}  // namespace oryx::evaluation
