/** The workbench's icon: token bars over a baseline. */

import { LabIcon } from '@jupyterlab/ui-components';

const svgstr = `<svg xmlns="http://www.w3.org/2000/svg" width="16" height="16" viewBox="0 0 24 24">
  <g class="jp-icon3" fill="#616161">
    <rect x="3" y="13" width="3.2" height="6" rx="0.8"/>
    <rect x="8.2" y="9.5" width="3.2" height="9.5" rx="0.8"/>
    <rect x="18.6" y="11" width="2.4" height="8" rx="0.8"/>
  </g>
  <rect x="13.4" y="4" width="3.2" height="15" rx="0.8" fill="#E69F00"/>
  <rect class="jp-icon3" x="2" y="20.4" width="20" height="1.4" rx="0.7" fill="#616161"/>
</svg>`;

export const workbenchIcon = new LabIcon({ name: 'inference-workbench:icon', svgstr });
